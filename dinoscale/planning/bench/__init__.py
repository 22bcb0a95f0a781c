"""Measure the speed of parts of a run on this machine."""
