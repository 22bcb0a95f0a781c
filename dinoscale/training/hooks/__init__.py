"""Observers of a run: they read metrics and write files, and change no gradient or weight."""
