"""Pages and pictures of what was trained, measured and compared."""
