"""Prepare and examine sets of images before a training; see README.md."""
