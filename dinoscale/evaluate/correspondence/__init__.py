"""Places of one picture found again in another by their patch features."""
