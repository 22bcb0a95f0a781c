"""A preset that suits a set of images, with the reason of each value."""
