"""Observers of a run: they read numbers and write files; no gradient or weight passes through."""
