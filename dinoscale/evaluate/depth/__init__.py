"""What patch features tell of the distance of every pixel."""
