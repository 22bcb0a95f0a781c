"""Tensors of the reference's networks with the names and layout of ours."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

_Value = TypeVar("_Value")

_NAMES = {  # of parts of the reference's
    "dino_head": "head",
    "ibot_head": "patch_head",
    "register_tokens": "reg_token",
    "storage_tokens": "reg_token",
    "local_cls_norm": "local_norm",
    ".mlp.w12.": ".mlp.fc1.",
    ".mlp.w3.": ".mlp.fc2.",
}
_FIRST, _SECOND = ".mlp.w1.", ".mlp.w2."  # matrices of a SwiGLU, one in ours
FIXED = ("rope_embed.periods", ".qkv.bias_mask")  # buffers, which follow from the settings


def our_name(name: str) -> str:
    """The name of one of the reference's tensors in our networks."""
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace(_FIRST, ".mlp.fc1.")


def in_our_names(
    named: Mapping[str, _Value], join: Callable[[_Value, _Value], _Value]
) -> dict[str, _Value]:
    """Values by our names, those of both factors of a SwiGLU joined, without buffers."""
    ours = {}
    for name, value in named.items():
        if name.endswith(FIXED) or _SECOND in name:
            continue
        if _FIRST in name:
            value = join(value, named[name.replace(_FIRST, _SECOND)])
        ours[our_name(name)] = value
    return ours


def joined_rows(first: Tensor, second: Tensor) -> Tensor:
    """Two matrices, or biases, as one."""
    return torch.cat((first, second))


def our_tensors(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The tensors below a prefix, or gradients, which have the layout of their weights."""
    below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return in_our_names(below, joined_rows)
