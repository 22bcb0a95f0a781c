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
from dinoscale.convert.formats.reference import has_gated_mlp, reference_card
from dinoscale.errors import CheckpointError
from dinoscale.models.rope import Rope

_PERIODS = "rope_embed.periods"
_MASK = ".attn.qkv.bias_mask"
_FIRST, _SECOND = ".mlp.w1.", ".mlp.w2."
_RENAMED = (("storage_tokens", "reg_token"), ("local_cls_norm.", "local_norm."))
_NAMES = {  # by embed_dim; the sizes in a shape override the name's
    384: "vit_small_patch16_dinov3",
    768: "vit_base_patch16_dinov3",
    1024: "vit_large_patch16_dinov3",
}
_SIDE = 256  # pixels of a global crop in the published training
_BLOCK = re.compile(r"blocks\.(?:\d{1,9}\.)?(\d{1,9})\.")


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


def dinov3_shape(state: Mapping[str, Tensor]) -> BackboneShape:
    """The architecture, from the names and shapes of the tensors and from the periods.

    Args:
        state: as in the file.

    Raises:
        CheckpointError: the tensors are not those of a ViT of DINOv3, or no rule of ours gives
            the periods.
    """
    found = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    try:
        periods, patches = found[_PERIODS], found["patch_embed.proj.weight"]
        blocks = [int(match[1]) for name in found if (match := _BLOCK.match(name))]
        gated = any(name.endswith(".mlp.w1.weight") for name in found)
        hidden = next(
            len(tensor)
            for name, tensor in found.items()
            if name.endswith((".mlp.w1.weight", ".mlp.fc1.weight"))
        )
        embed_dim, channels, _, patch_size = patches.shape
        registers = found["storage_tokens"].shape[1] if "storage_tokens" in found else 0
        heads = embed_dim // (4 * len(periods))
    except (KeyError, StopIteration, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError("has rope_embed.periods, but is no ViT of DINOv3") from error
    return BackboneShape(
        name=_NAMES.get(embed_dim, "vit_small_patch16_dinov3"),
        img_size=_SIDE // patch_size * patch_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=max(blocks) + 1,
        num_heads=heads,
        in_chans=channels,
        ffn="swiglu" if gated else "mlp",
        ffn_ratio=_ratio(math.ceil(1.5 * hidden) if gated else hidden, embed_dim),
        ffn_multiple=1 if gated else None,
        registers=registers,
        mask_token="mask_token" in found,
        rope=_rope_of(periods),
        qkv_bias=any(name.endswith(".attn.qkv.bias") for name in found),
        mask_key_bias=any(name.endswith(_MASK) for name in found),
        local_norm="local_cls_norm.weight" in found,
    )


def dinov3_card(shape: BackboneShape, *, source: str) -> BackboneCard:
    """A card with the authors' preprocessing: ImageNet mean and std, images of 256 pixels."""
    card = reference_card(shape, source=source)
    return replace(card, resize=shape.img_size)


def _ratio(width: int, embed_dim: int) -> float:
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
