"""Target `dino`: a safetensors file of ours, or a `.pth` for the reference's own scripts.

Tensor names of a file with heads have the prefixes `backbone.`, `head.` and `patch_head.`, in a
`.pth` of a DINOv2 network `dino_head.` and `ibot_head.`; those of a backbone alone have none. Both
formats contain the card: a `.pth` in the metadata of the state dict, an attribute that scripts
ignore.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoscale.convert.card import METADATA_KEY
from dinoscale.convert.formats.dinov3 import as_in_dinov3
from dinoscale.convert.formats.reference import as_in_dinov2, is_dinov2
from dinoscale.convert.formats.special_tokens import with_class_slot
from dinoscale.convert.parity import Reopened, forward_of, under_our_names
from dinoscale.convert.read_files import METADATA
from dinoscale.convert.source import read_source
from dinoscale.convert.weights import Network, Weights
from dinoscale.models.block import KeylessBias
from dinoscale.models.weight_names import to_reference
from dinoscale.models.zoo import build_backbone
from dinoscale.runtime.outputs import write_tensors

_DINOV2_PARTS = {"backbone": "backbone", "head": "dino_head", "patch_head": "ibot_head"}


def is_pth(path: Path) -> bool:
    """Whether to write a torch file, for the reference's scripts."""
    return path.suffix == ".pth"


def dino_form(path: Path, weights: Weights) -> Weights:
    """The weights as `write_dino` keeps them: the reference's scripts need the class position."""
    return with_class_slot(weights) if is_pth(path) else weights


def write_dino(path: Path, weights: Weights) -> None:
    """Write the backbone, and the heads if there are any, for `torch.load` or safetensors.

    Args:
        path: file to write; the suffix .pth makes it a torch file: the backbone's state dict, or
            `{"teacher": {"backbone.*", "head.*"}}` with heads.
        weights: the weights to write.
    """
    tensors = _named(weights, for_reference=is_pth(path))
    if is_pth(path):
        state = OrderedDict(tensors)
        state.__dict__[METADATA] = {METADATA_KEY: weights.card.to_json()}
        torch.save(state if weights.head is None else {weights.network: state}, path)
        return
    metadata = {METADATA_KEY: weights.card.to_json(), "format": "pt"}
    write_tensors(tensors, path, metadata=metadata)


def _named(weights: Weights, *, for_reference: bool) -> dict[str, Tensor]:
    """Tensors under the names of the file, none sharing memory."""
    parts = weights.parts()
    if for_reference and weights.is_rotary:
        parts["backbone"] = _as_in_dinov3(weights)
        parts = {_DINOV2_PARTS[part]: state for part, state in parts.items()}
    elif for_reference and is_dinov2(weights.backbone):
        parts["backbone"] = as_in_dinov2(weights.backbone)
        parts = {_DINOV2_PARTS[part]: state for part, state in parts.items()}
    backbone = parts.pop("backbone")
    named = backbone if not parts else _prefixed("backbone", backbone)
    for part, state in parts.items():
        named = named | to_reference(_prefixed(part, state))
    return {name: tensor.clone().contiguous() for name, tensor in named.items()}


def _as_in_dinov3(weights: Weights) -> dict[str, Tensor]:
    with torch.device("meta"):
        network: Any = build_backbone(**vars(weights.card.backbone))
    attention = network.blocks[0].attn
    return as_in_dinov3(
        weights.backbone,
        rope=network.rope,
        num_heads=attention.num_heads,
        key_bias_masked=isinstance(attention.qkv, KeylessBias),
    )


def _prefixed(part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in state.items()}


def reopen_dino(path: Path, network: Network) -> Reopened:
    """Read the file and build the network that its card describes."""
    found = read_source(path, network=network)
    return Reopened(forward_of(found), under_our_names(found), (found.card,))
