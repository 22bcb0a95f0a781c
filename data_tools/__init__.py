"""Prepare and examine image sets before training; see README.md."""
