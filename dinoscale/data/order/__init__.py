"""Which image is read when."""
