"""Features of whole sets of images, written to files that need none of our code."""
