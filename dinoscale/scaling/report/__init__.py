"""What a sweep found: a page, numbers, and the preset to train next."""
