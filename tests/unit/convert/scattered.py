"""Weights of networks of other libraries that tell every tensor from another."""

import torch
from torch import nn


def scatter(model: nn.Module) -> None:
    """Weights far from their initial values, in which biases are 0 and norms 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
