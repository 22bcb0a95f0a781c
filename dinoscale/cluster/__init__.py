"""The machines of a run: are they fit, do they agree, how is a run started on them."""
