"""Optimizer groups of DINO v1: with weight decay, without, and the prototypes apart."""

from typing import Any

import torch
from torch import nn

DECAY, NO_DECAY, PROTOTYPES = "decay", "no_decay", "prototypes"


def param_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Split trainable parameters as the reference does.

    Biases and one-dimensional tensors never decay; everything else does, the CLS token, the
    position embedding and the prototypes included (timm's `no_weight_decay` is not used). The
    prototypes have a group of their own because they are frozen during the first epochs.

    Returns:
        Non-empty groups with keys `name`, `params`, `weight_decay`, `frozen`.
    """
    members: dict[str, list[nn.Parameter]] = {DECAY: [], NO_DECAY: [], PROTOTYPES: []}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if "last_layer" in name:
            members[PROTOTYPES].append(parameter)
        elif name.endswith(".bias") or len(_shape(parameter)) == 1:
            members[NO_DECAY].append(parameter)
        else:
            members[DECAY].append(parameter)
    return [
        {"name": name, "params": params, "weight_decay": 0.0, "frozen": False}
        for name, params in members.items()
        if params
    ]


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The full shape, also of a parameter that DeepSpeed has partitioned and flattened."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def build_optimizer(name: str, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the reference's betas and eps, or SGD with momentum 0.9; each step sets the rate.

    Fused, on a CPU too: one pass over memory, and `found_inf` skips a step on the device.
    """
    groups = param_groups(network)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


# State tensors of each optimizer, by torch's names.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
