"""Rename weights from our names to those of the authors' code, and back.

Backbone names agree. The prototype layer differs: the authors' weight norm always stores a norm g
next to the direction v, even when g is frozen at one; we store g only when it trains. Adapters,
which the authors' code does not have, are merged into the matrices that they stand beside.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dinoscale.errors import CheckpointError

_PREFIX = "module."  # added by DistributedDataParallel
_A, _B = "lora_a", "lora_b"  # of an adapter, see `block.add_adapters`
_G, _V = "last_layer.weight_g", "last_layer.weight_v"
_NEW_NAMES = {  # torch.nn.utils.parametrizations.weight_norm
    "last_layer.parametrizations.weight.original0": _G,
    "last_layer.parametrizations.weight.original1": _V,
}


def to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our state dict to the authors' names: a frozen prototype norm becomes ones.

    Args:
        state: of a network or of a head, prefixes like `head.` included.

    Returns:
        The same tensors, and `...last_layer.weight_g` (K, 1) before each `weight_v` without one.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        norm = name.removesuffix(_V) + _G
        if _ends(name, _V) and norm not in state:
            renamed[norm] = torch.ones_like(tensor[:, :1])
        renamed[name] = tensor
    return renamed


def from_reference(state: Mapping[str, Tensor], *, norm_last_layer: bool) -> dict[str, Tensor]:
    """Rename the authors' state dict to our names.

    Args:
        state: with old (weight_g, weight_v) or new (parametrizations) names of weight norm, and
            with or without a leading `module.`.
        norm_last_layer: whether our head keeps the norm of its prototypes at one.

    Returns:
        The same tensors, without `weight_g` if `norm_last_layer`.

    Raises:
        CheckpointError: `norm_last_layer`, and a `weight_g` is not all ones.
    """
    renamed: dict[str, Tensor] = {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix(_PREFIX)
        for new, old in _NEW_NAMES.items():
            if _ends(name, new):
                name = name.removesuffix(new) + old
        if norm_last_layer and _ends(name, _G):
            if not bool((tensor == 1).all()):
                raise CheckpointError(
                    f"{full_name}: prototype norms between {tensor.min():.4g} and "
                    f"{tensor.max():.4g}, but head.norm_last_layer=true keeps them at 1; "
                    "set head.norm_last_layer=false to load these weights"
                )
            continue
        renamed[name] = tensor
    return renamed


def merged(state: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """The weights of a network without adapters that computes the same.

    Args:
        state: tensors by name, some of them of adapters.
        scale: alpha / r.

    Returns:
        W + scale B A in place of W, summed in float64 and rounded once; all other tensors as they
        are, without those of adapters.
    """
    result = {
        name: value for name, value in state.items() if not name.endswith((f".{_A}", f".{_B}"))
    }
    for name, a in state.items():
        if name.endswith(f".{_A}"):
            layer = name.removesuffix(_A)
            weight = result[f"{layer}weight"]
            change = scale * (state[f"{layer}{_B}"].double() @ a.double())
            result[f"{layer}weight"] = (weight.double() + change).to(weight.dtype)
    return result


def _ends(name: str, suffix: str) -> bool:
    """Whether `suffix` is the whole tail of a dotted name."""
    return name == suffix or name.endswith("." + suffix)
