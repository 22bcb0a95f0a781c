"""The schema of a sweep's file."""
