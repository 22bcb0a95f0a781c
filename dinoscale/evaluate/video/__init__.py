"""Video object segmentation."""
