"""Target `dino`: a safetensors file of ours, or a `.pth` for the reference's own scripts.

Names of a file with a head have the prefixes `backbone.` and `head.`; those of a backbone alone
have none. Head names are the reference's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinoscale.convert.card import METADATA_KEY
from dinoscale.convert.coverage import coverage_of
from dinoscale.convert.parity import Reopened, our_forward
from dinoscale.convert.source import read_source
from dinoscale.convert.weights import Weights
from dinoscale.convert.weights_file import build
from dinoscale.models.weights import to_reference


def is_pth(path: Path) -> bool:
    """Whether a target is to be written as a torch file, for the reference's scripts."""
    return path.suffix == ".pth"


def write_dino(path: Path, weights: Weights) -> None:
    """Write backbone, and head if there is one, as `torch.load` or safetensors open them.

    Args:
        path: file to write; a name that ends in .pth makes it a torch file: the backbone's state
            dict, or `{"teacher": {"backbone.*", "head.*"}}` with a head.
        weights: what to write.
    """
    tensors = _named(weights)
    if is_pth(path):
        torch.save(tensors if weights.head is None else {weights.network: tensors}, path)
        return
    metadata = {METADATA_KEY: weights.card.to_json(), "format": "pt"}
    save_file(tensors, path, metadata=metadata)


def _named(weights: Weights) -> dict[str, Tensor]:
    """Tensors without shared memory, under the names of the file."""
    named = weights.backbone
    if weights.head is not None:
        head = to_reference({f"head.{name}": tensor for name, tensor in weights.head.items()})
        named = {f"backbone.{name}": tensor for name, tensor in named.items()} | head
    return {name: tensor.clone().contiguous() for name, tensor in named.items()}


def reopen_dino(path: Path, weights: Weights) -> Reopened:
    """Read the file and build it strictly; a `.pth` tells no architecture, so the card does."""
    num_heads = weights.card.backbone.num_heads
    found = read_source(path, network=weights.network, num_heads=num_heads)
    backbone, coverage = build(replace(found, card=weights.card))
    if weights.head is not None:
        of_head = coverage_of(found.head or {}, weights.head)
        coverage = replace(
            of_head,
            expected=coverage.expected + of_head.expected,
            missing=tuple(f"head.{name}" for name in of_head.missing),
        )
    return Reopened(our_forward(backbone), coverage)
