"""Several weights side by side."""
