"""Measures of features that need no labels: effective ranks and the decay of the spectrum."""
