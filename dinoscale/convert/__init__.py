"""Weights in and out: our files, and the formats of other libraries."""
