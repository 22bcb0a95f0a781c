"""Target `dino`: a safetensors file of ours, or a `.pth` for the reference's own scripts.

Tensor names of a file with a head have the prefixes `backbone.` and `head.`; those of a backbone
alone have none. Head names are the reference's. Both formats contain the card: a `.pth` in the
metadata of the state dict, an attribute that scripts ignore.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from dinoscale.convert.card import METADATA_KEY
from dinoscale.convert.parity import Reopened, our_forward
from dinoscale.convert.read_files import METADATA
from dinoscale.convert.source import read_source
from dinoscale.convert.weights import Network, Weights
from dinoscale.convert.weights_file import build, build_head
from dinoscale.models.weight_names import to_reference
from dinoscale.runtime.outputs import write_tensors


def is_pth(path: Path) -> bool:
    """Whether to write a torch file, for the reference's scripts."""
    return path.suffix == ".pth"


def write_dino(path: Path, weights: Weights) -> None:
    """Write the backbone, and the head if there is one, for `torch.load` or safetensors.

    Args:
        path: file to write; the suffix .pth makes it a torch file: the backbone's state dict, or
            `{"teacher": {"backbone.*", "head.*"}}` with a head.
        weights: the weights to write.
    """
    tensors = _named(weights)
    if is_pth(path):
        state = OrderedDict(tensors)
        state.__dict__[METADATA] = {METADATA_KEY: weights.card.to_json()}
        torch.save(state if weights.head is None else {weights.network: state}, path)
        return
    metadata = {METADATA_KEY: weights.card.to_json(), "format": "pt"}
    write_tensors(tensors, path, metadata=metadata)


def _named(weights: Weights) -> dict[str, Tensor]:
    """Tensors under the names of the file, none sharing memory."""
    named = weights.backbone
    if weights.head is not None:
        head = to_reference({f"head.{name}": tensor for name, tensor in weights.head.items()})
        named = {f"backbone.{name}": tensor for name, tensor in named.items()} | head
    return {name: tensor.clone().contiguous() for name, tensor in named.items()}


def reopen_dino(path: Path, network: Network) -> Reopened:
    """Read the file and build the network that its card describes."""
    found = read_source(path, network=network)
    backbone, _ = build(found)
    head = None if found.head is None else build_head(found.head)
    of_head = {f"head.{name}": tensor for name, tensor in (found.head or {}).items()}
    return Reopened(our_forward(backbone, head), {**found.backbone, **of_head}, (found.card,))
