"""A training run from start to end: set-up, loop, hooks and resume."""
