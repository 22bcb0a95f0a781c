"""Backbones in the layout of DINOv3's authors: what differs from ours, and the architecture.

Source: github.com/facebookresearch/dinov3, its published backbones and `teacher_checkpoint.pth`.
Both factors of a SwiGLU are matrices of their own, `w1` and `w2`; periods of the rotary positions
and the mask of the keys' bias are stored. No tensor shows the epsilon of the layer norms, nor how
coordinates are normalised: those of the published models are assumed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.convert.formats.reference import (
    HEAD_DIM,
    guess_heads,
    has_gated_mlp,
    reference_card,
)
from dinoscale.convert.weights import Weights
from dinoscale.errors import CheckpointError
from dinoscale.models.rope import Rope
from dinoscale.models.zoo import own_layers

_PERIODS = "rope_embed.periods"
_MASK = ".attn.qkv.bias_mask"
_FIRST, _SECOND = ".mlp.w1.", ".mlp.w2."
_RENAMED = (("storage_tokens", "reg_token"), ("local_cls_norm.", "local_norm."))
_SIZES = {  # names by embed_dim and whether the MLP is a SwiGLU; sizes in a shape override them
    (384, False): "small",
    (384, True): "small_plus",
    (768, False): "base",
    (1024, False): "large",
    (1280, True): "huge_plus",
    (4096, True): "7b",
}
_HEAD_DIMS = {4096: 128}  # by embed_dim, where they differ from the reference's
_SIDE = 256  # pixels of a global crop in the published training
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")


def is_dinov3(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors are those of a network of DINOv3 under its authors' names."""
    return any(name.removeprefix("backbone.") == _PERIODS for name in state)


def from_dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names, without buffers; those of heads keep theirs.

    Raises:
        CheckpointError: a SwiGLU lacks a factor, or another part of a bias than the keys' is
            masked.
    """
    ours = {}
    for name, tensor in state.items():
        if name.endswith(_MASK):
            _require_mask_of_keys(name, tensor)
            continue
        if name.endswith(_PERIODS) or _SECOND in name:
            continue
        if _FIRST in name:
            second = state.get(name.replace(_FIRST, _SECOND))
            if second is None or second.shape != tensor.shape:
                raise CheckpointError(f"lacks the other factor of {name}")
            name, tensor = name.replace(_FIRST, ".mlp.fc1."), torch.cat((tensor, second))
        name = name.replace(".mlp.w3.", ".mlp.fc2.")
        for theirs, of_ours in _RENAMED:
            name = name.replace(theirs, of_ours)
        ours[name] = tensor
    return ours


def _require_mask_of_keys(name: str, mask: Tensor) -> None:
    expected = torch.ones_like(mask)
    expected[len(mask) // 3 : 2 * len(mask) // 3] = 0
    if not torch.equal(mask, expected):
        raise CheckpointError(f"holds {name}, which masks another part than the bias of the keys")


def dinov3_shape(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> BackboneShape:
    """The architecture, from the periods and the tensors.

    Args:
        state: as in the file.
        ours: its backbone under our names.

    Raises:
        CheckpointError: the tensors are not those of a ViT of DINOv3, or no rule of ours gives
            the periods.
    """
    periods = next(x for name, x in state.items() if name.removeprefix("backbone.") == _PERIODS)
    if periods.ndim != 1 or not len(periods):
        raise CheckpointError(f"has {_PERIODS} of shape {[*periods.shape]}, which is no list")
    return rotary_shape(
        ours,
        rope=_rope_of(periods),
        head_dim=4 * len(periods),
        mask_key_bias=any(name.endswith(_MASK) for name in state),
    )


def rotary_shape(
    state: Mapping[str, Tensor],
    *,
    rope: Rope,
    mask_key_bias: bool,
    num_heads: int | None = None,
    head_dim: int | None = None,
) -> BackboneShape:
    """The architecture of a ViT of DINOv3, from the names and shapes of its tensors.

    Args:
        state: a backbone under our names.
        rope: its rotary positions.
        mask_key_bias: whether the keys' part of the bias does not act.
        num_heads: attention heads; without `head_dim`, None guesses those of the released model of
            this width, else 64 channels a head, with a warning.
        head_dim: channels of a head, where the tensors show them.

    Raises:
        CheckpointError: the tensors are not those of a ViT of DINOv3, or the width is no multiple
            of the channels of a head.
    """
    try:
        embed_dim, channels, _, patch_size = state["patch_embed.proj.weight"].shape
        hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        if not 1 <= patch_size <= _SIDE or not channels or not embed_dim:
            raise ValueError("no patches")
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError("has rotary positions, but is no ViT of DINOv3") from error
    if head_dim is not None:
        num_heads, rest = divmod(embed_dim, head_dim)
        if rest:
            raise CheckpointError(
                f"is {embed_dim} wide, which is no multiple of the {head_dim} channels of a head "
                "that its rotary positions show"
            )
    elif not num_heads:
        num_heads = guess_heads(embed_dim, head_dim=_HEAD_DIMS.get(embed_dim, HEAD_DIM))
    gated = has_gated_mlp(state)
    blocks = [int(match[1]) for name in state if (match := _BLOCK.match(name))]
    return BackboneShape(
        name=model_name(embed_dim, gated=gated),
        img_size=_SIDE // patch_size * patch_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=max(blocks) + 1,
        num_heads=num_heads,
        in_chans=channels,
        ffn="swiglu" if gated else "mlp",
        ffn_ratio=ratio_of(math.ceil(1.5 * hidden) if gated else hidden, embed_dim),
        ffn_multiple=1 if gated else None,
        registers=registers,
        mask_token="mask_token" in state,
        rope=rope,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        mask_key_bias=mask_key_bias,
        local_norm="local_norm.weight" in state,
    )


def model_name(embed_dim: int, *, gated: bool) -> str:
    """The released model of this width and kind of MLP, else the smallest of the kind."""
    size = _SIZES.get((embed_dim, gated), "small_plus" if gated else "small")
    return f"vit_{size}_patch16_dinov3"


def dinov3_card(shape: BackboneShape, *, source: str) -> BackboneCard:
    """A card with the authors' preprocessing: ImageNet mean and std, images of 256 pixels."""
    card = reference_card(shape, source=source)
    return replace(card, resize=shape.img_size)


def ratio_of(width: int, embed_dim: int) -> float:
    """Of an MLP of this width: `int(ratio * embed_dim)` is the width."""
    ratio = width / embed_dim
    return ratio if int(ratio * embed_dim) == width else (width + 0.5) / embed_dim


def _rope_of(periods: Tensor) -> Rope:
    """The simplest rule that gives these periods, which may be rounded to bfloat16.

    Raises:
        CheckpointError: none does.
    """
    first, last, count = float(periods[0]), float(periods[-1]), len(periods)
    exact = periods.double()
    rounded = torch.equal(periods.bfloat16().double(), exact)
    once, twice = (2**-8, 2**-6) if rounded else (1e-5, 1e-5)  # twice: its exponents, too
    rules = [(Rope(base=None, min_period=first, max_period=last), twice)]
    if first == 1 and count > 1 and 0 < last < math.inf:
        base = last ** (count / (count - 1))
        round_ones = float(f"{base:.2g}"), float(round(base))  # as those published
        rules = [*((Rope(base=one), once) for one in round_ones), (Rope(base=base), twice), *rules]
    for rule, tolerance in rules:
        found = rule.periods(4 * count, dtype=torch.float64, device=periods.device)
        if torch.allclose(found, exact, rtol=tolerance, atol=0):
            return rule
    raise CheckpointError("holds rope_embed.periods that follow neither a base nor two ends")


def rope_of(shape: BackboneShape) -> Rope:
    """The rotary positions of a network that has them, which may be its name's own."""
    return shape.rope or own_layers(shape.name).rope or Rope()


def unlike_libraries(rope: Rope) -> str | None:
    """Why timm and transformers have no such positions, or None."""
    if rope.base is None:
        return f"its periods run from {rope.min_period:g} to {rope.max_period:g}, not by a base"
    if rope.coordinates != "separate":
        return f"its coordinates are normalised by {rope.coordinates!r}, not 'separate'"
    return None


def key_bias_is_masked(shape: BackboneShape) -> bool:
    """Whether the keys' part of the bias does not act, which may be the name's own."""
    masked = shape.mask_key_bias
    return bool(own_layers(shape.name).mask_key_bias if masked is None else masked)


def key_bias_acts(weights: Weights) -> bool:
    """Whether queries are compared with keys that have a bias other than zero."""
    if key_bias_is_masked(weights.card.backbone):
        return False
    return any(bool(x.chunk(3)[1].any()) for _, x in _biases(weights))


def without_masked_bias(weights: Weights) -> Weights:
    """Weights whose keys' part of the bias is zero if it does not act."""
    if not key_bias_is_masked(weights.card.backbone):
        return weights
    zeroed = dict(weights.backbone)
    for name, bias in _biases(weights):
        of_queries, of_keys, of_values = bias.chunk(3)
        zeroed[name] = torch.cat((of_queries, torch.zeros_like(of_keys), of_values))
    return replace(weights, backbone=zeroed)


def _biases(weights: Weights) -> list[tuple[str, Tensor]]:
    ends = ".attn.qkv.bias"
    return [(name, x) for name, x in weights.backbone.items() if name.endswith(ends)]


def as_in_dinov3(
    state: Mapping[str, Tensor], *, rope: Rope, num_heads: int, key_bias_masked: bool
) -> dict[str, Tensor]:
    """A backbone of ours under the authors' names, with their buffers."""
    gated, theirs = has_gated_mlp(state), dict[str, Tensor]()
    for name, tensor in state.items():
        for original, of_ours in _RENAMED:
            name = name.replace(of_ours, original)
        if gated and ".mlp.fc1." in name:
            halves = tensor.chunk(2)
            theirs[name.replace(".mlp.fc1.", _FIRST)] = halves[0]
            theirs[name.replace(".mlp.fc1.", _SECOND)] = halves[1]
            continue
        theirs[name.replace(".mlp.fc2.", ".mlp.w3.") if gated else name] = tensor
        if key_bias_masked and name.endswith(".attn.qkv.bias"):
            mask = torch.ones_like(tensor)
            mask[len(mask) // 3 : 2 * len(mask) // 3] = 0
            theirs[name.removesuffix(".attn.qkv.bias") + _MASK] = mask
    head_dim = state["cls_token"].shape[-1] // num_heads
    theirs[_PERIODS] = rope.periods(head_dim, dtype=torch.float32, device=torch.device("cpu"))
    return theirs
