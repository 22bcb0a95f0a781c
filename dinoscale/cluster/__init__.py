"""The machines of a run: check that they are fit and agree, and start a run on them."""
