"""Weights in files: ours, and those of others read into ours."""
