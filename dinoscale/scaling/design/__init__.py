"""From the file of a sweep to its runs, and what they cost."""
