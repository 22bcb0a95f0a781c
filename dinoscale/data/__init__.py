"""From a path to batches of crops: sources, decoding, order, augmentation, loading."""
