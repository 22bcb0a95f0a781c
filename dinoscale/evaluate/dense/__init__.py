"""What patch tokens and attention show: maps, objects, colours."""
