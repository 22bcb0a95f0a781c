"""The design of a sweep: its runs, worked out from one file, and their cost."""
