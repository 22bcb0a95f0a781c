"""Objects that patch features show, without labels and training."""
