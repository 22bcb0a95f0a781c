"""Objectives of self-distillation and the targets they need."""
