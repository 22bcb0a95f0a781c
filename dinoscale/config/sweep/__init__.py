"""The file of a sweep: what it may say."""
