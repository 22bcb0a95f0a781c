"""A training from its first line to its last: start, loop, what watches it, resume."""
