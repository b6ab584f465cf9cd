"""Every published layout in, our folder out."""
