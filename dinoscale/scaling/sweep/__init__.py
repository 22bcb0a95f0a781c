"""Run a sweep: start its jobs, measure its runs, and keep their results in one table."""
