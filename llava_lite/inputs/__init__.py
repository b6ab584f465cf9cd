"""Image and text in, tensors and token ids out."""
