"""What `train_tiny.py` trains the embedded model by."""
