"""Before a long run: predict what it needs, and measure what the machine can do."""
