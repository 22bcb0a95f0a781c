"""Optimizer groups (with weight decay, without, and the prototypes apart) and rates within them.

Rates differ within a group, as DeepSpeed spends collectives on each group.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

DECAY, NO_DECAY, PROTOTYPES = "decay", "no_decay", "prototypes"


def param_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Split trainable parameters as DINO and DINOv2 do.

    Biases and one-dimensional tensors (norms, LayerScale) never decay; everything else does,
    tokens, the position embedding and the prototypes included (timm's `no_weight_decay` is not
    used). The prototypes of all heads have a group of their own because they are frozen during the
    first epochs.

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


def trained_names(
    names: Iterable[str], *, adapters: bool, norms: bool, patch_embed: bool, blocks: int | None
) -> set[str]:
    """Those of a backbone with heads that train.

    Heads and the mask token always do: no feature of a picture without masks depends on them.

    Args:
        names: of all parameters.
        adapters: of the backbone train the adapters, not what they stand beside.
        norms: with adapters, all its norms too.
        patch_embed: with adapters, the patch projection too.
        blocks: without, only its last so many blocks and the final norms; None for everything.
    """
    last = max((layer for name in names if (layer := _layer(name))), default=0)

    def trains(name: str) -> bool:
        if not name.startswith("backbone.") or name == "backbone.mask_token":
            return True
        if adapters:
            is_norm = any("norm" in part for part in name.split("."))
            is_projection = name.startswith("backbone.patch_embed.")
            return "lora_" in name or (norms and is_norm) or (patch_embed and is_projection)
        layer = _layer(name)
        return blocks is None or layer is None or layer > last - blocks

    return {name for name in names if trains(name)}


def rate_factors(
    names: Iterable[str], *, layer_decay: float, patch_embed_lr: float, backbone_lr: float = 1.0
) -> dict[str, float]:
    """Factor of each tensor's learning rate: layer_decay ** (L + 1 - layer), as in DINOv2.

    Layer 0 is the embeddings: patches, positions and all tokens; block i is layer i + 1; the final
    norm and the heads, layer L + 1, have the full rate. That of the patch projection is multiplied
    by `patch_embed_lr` as well, that of the rest of the backbone by `backbone_lr`.

    Args:
        names: of all parameters of a backbone with heads (`backbone.blocks.0.norm1.weight`).
        layer_decay: factor from each layer to the one before, in (0, 1].
        patch_embed_lr: further factor of `backbone.patch_embed.*`, >= 0.
        backbone_lr: further factor of all other `backbone.*`, >= 0.
    """
    layers = {name: _layer(name) for name in names}
    last = 1 + max((layer for layer in layers.values() if layer is not None), default=0)
    factors = {}
    for name, layer in layers.items():
        factors[name] = 1.0 if layer is None else layer_decay ** (last - layer)
        if name.startswith("backbone.patch_embed."):
            factors[name] *= patch_embed_lr
        elif name.startswith("backbone."):
            factors[name] *= backbone_lr
    return factors


def _layer(name: str) -> int | None:
    """0 for embeddings, i + 1 for block i, None for what comes after the blocks."""
    parts = name.split(".")
    if parts[:2] == ["backbone", "blocks"]:
        return int(parts[2]) + 1
    embeds = parts[0] == "backbone" and parts[1].endswith(("_embed", "_token"))
    return 0 if embeds else None


def build_optimizer(
    name: str,
    network: nn.Module,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    layerwise: bool = False,
) -> torch.optim.Optimizer:
    """AdamW with the reference's eps, or SGD with momentum 0.9; each step sets the rate.

    Fused, on a CPU too: one pass over memory, and `found_inf` skips a step on the device.

    Args:
        name: `adamw` or `sgd`.
        network: whose parameters are trained.
        betas: of AdamW.
        layerwise: `LayerwiseAdamW`, whose parts get their rates later.
    """
    groups = param_groups(network)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    if layerwise:
        return LayerwiseAdamW(groups, lr=0.0, betas=betas, eps=1e-8)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


class LayerwiseAdamW(torch.optim.AdamW):
    """AdamW whose learning rate differs between parts of a tensor, such as a flat shard.

    State and state dict are torch's. Each rate costs one call of torch's fused kernel per group.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self._parts: dict[int, list[tuple[float, int, int]]] = {}

    def set_factors(self, tensor: Tensor, parts: Sequence[tuple[float, int, int]]) -> None:
        """Set the factors of the learning rate within a tensor, before its first step.

        Args:
            tensor: one of the optimizer's.
            parts: (factor, first element, count) in ascending order. Elements in no part, the
                padding of shards, do not move.
        """
        joined: list[tuple[float, int, int]] = []
        for factor, start, numel in parts:
            if joined and joined[-1][0] == factor and sum(joined[-1][1:]) == start:
                start, numel = joined[-1][1], joined[-1][2] + numel
                joined.pop()
            joined.append((factor, start, numel))
        self._parts[id(tensor)] = joined

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody passes one
        """Update every tensor that has a gradient, unless `found_inf` is 1 on the device."""
        assert closure is None
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if tensors:
                self._step_group(group, tensors)

    def _step_group(self, group: dict[str, Any], tensors: list[Tensor]) -> None:
        counts = [self._state_of(tensor)["step"] for tensor in tensors]
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        torch._foreach_add_(counts, 1)  # once per tensor, however many parts it has
        for factor, views in self._views_by_factor(tensors).items():
            weights, gradients, means, squares, steps = map(list, zip(*views, strict=True))
            torch._fused_adamw_(
                weights,
                gradients,
                means,
                squares,
                [],
                steps,
                lr=group["lr"] * factor,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )
        if found_inf is not None:
            torch._foreach_sub_(counts, [found_inf] * len(counts))

    def _views_by_factor(self, tensors: list[Tensor]) -> dict[float, list[tuple[Tensor, ...]]]:
        """Factor -> weights, gradients, both moments and step count of each part that has it."""
        by_factor: dict[float, list[tuple[Tensor, ...]]] = {}
        for tensor in tensors:
            state = self.state[tensor]
            assert tensor.grad is not None
            wholes = tensor, tensor.grad, state["exp_avg"], state["exp_avg_sq"]
            for factor, start, numel in self._parts[id(tensor)]:
                views = [whole.view(-1).narrow(0, start, numel) for whole in wholes]
                by_factor.setdefault(factor, []).append((*views, state["step"]))
        return by_factor

    def _state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), device=tensor.device)
            state["exp_avg"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        return state


# State tensors of each optimizer, by torch's names.
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
