"""The same architecture before training: a baseline of every measurement."""

from __future__ import annotations

import torch
from torch import nn

from dinoscale.convert.card import BackboneCard
from dinoscale.models.zoo import build_backbone

SEED = 0


def untrained_backbone(card: BackboneCard) -> nn.Module:
    """Build the backbone of a card with fresh weights of seed 0, on the CPU, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        backbone = build_backbone(**vars(card.backbone))
    return backbone.eval().requires_grad_(False)
