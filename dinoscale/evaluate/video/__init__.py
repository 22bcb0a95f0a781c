"""Objects followed through a video."""
