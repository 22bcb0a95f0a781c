"""Patch tokens and attention: maps, object masks, principal components."""
