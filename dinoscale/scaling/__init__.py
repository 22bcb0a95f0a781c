"""From the table of a sweep to fitted laws, a page, and the configuration to train next."""
