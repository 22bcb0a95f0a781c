"""Choosing images for a training by their embeddings: clusters, balance, neighbours, copies."""
