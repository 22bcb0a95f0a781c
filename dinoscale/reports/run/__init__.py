"""The report of a single run."""
