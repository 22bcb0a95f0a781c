"""Backbones and heads: tensors in, tensors out."""
