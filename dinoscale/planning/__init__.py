"""Before a long run: what it will need, and what the machine at hand can do."""
