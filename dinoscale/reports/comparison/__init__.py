"""Comparison of several weights."""
