"""Tensors of one of the reference's backbones with the names and layout of ours."""

from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = {  # of parts of the reference's
    "register_tokens": "reg_token",
    "storage_tokens": "reg_token",
    "local_cls_norm": "local_norm",
    ".mlp.w12.": ".mlp.fc1.",
    ".mlp.w3.": ".mlp.fc2.",
}
_FIXED = ("rope_embed.periods", ".qkv.bias_mask")  # buffers, which follow from the settings


def our_backbone_name(name: str) -> str:
    """The name of one of its tensors in ours; `w1` and `w2` keep theirs."""
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def our_backbone(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix; both factors of a SwiGLU become one matrix, buffers are dropped.

    Also right for gradients, which have the layout of their weights.
    """
    ours = {}
    for full_name, value in state.items():
        if not full_name.startswith(prefix) or full_name.endswith(_FIXED):
            continue
        name = our_backbone_name(full_name.removeprefix(prefix))
        if ".mlp.w1." in name:
            gate = state[full_name.replace(".mlp.w1.", ".mlp.w2.")]
            name, value = name.replace(".mlp.w1.", ".mlp.fc1."), torch.cat((value, gate))
        if ".mlp.w2." not in name:
            ours[name] = value
    return ours
