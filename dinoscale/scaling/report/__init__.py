"""The report of a sweep: a page, numbers, and the preset to train next."""
