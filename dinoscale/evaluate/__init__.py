"""Evaluation of backbones: classification, dense tasks, retrieval, video."""
