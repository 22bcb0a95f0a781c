"""What the features are worth: nearest neighbours, and pictures of attention."""
