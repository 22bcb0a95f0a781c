"""Predict memory, time and communication of a run before it is queued, without a GPU."""
