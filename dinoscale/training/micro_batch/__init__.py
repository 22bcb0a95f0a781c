"""The largest micro-batch that fits in memory, found by trying."""
