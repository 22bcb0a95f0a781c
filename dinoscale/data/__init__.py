"""Images to batches: sources, augmentation, loading."""
