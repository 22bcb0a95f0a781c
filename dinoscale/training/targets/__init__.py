"""Outputs of a frozen teacher, computed once and stored, from which students are trained."""
