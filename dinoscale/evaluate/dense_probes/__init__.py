"""What tasks on single pixels share: images with targets, maps of features, a linear head."""
