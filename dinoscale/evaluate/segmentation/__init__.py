"""What patch features tell of the class of every pixel."""
