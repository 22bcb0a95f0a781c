"""Measurements of parts of a run on the machine at hand."""
