"""Whether a run's backbone computes at step 0 what the network computes that it starts from.

Compared where the weights are still whole, on rank 0, in float32, between two networks that share
their tensors: a network of 7 billion weights takes no second copy of them. Names and shapes that
fit do not show the settings without a tensor (epsilons, rotary positions), nor positions or a first
layer that were adapted wrongly. That a file is read rightly is another matter, which recorded
outputs of the authors' networks prove (`tests/golden23/test_weights.py`).

Shape letters: N pictures, C channels of the run, H x W pixels, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dinoscale.engine.build import StepZero
from dinoscale.models.convnet import ConvNet
from dinoscale.models.vit import VisionTransformer

# Relative rounding: a float32 sum of K products in another order differs by some sqrt(K / 3) 2^-24,
# for the 588 of a patch of 14 x 14 pixels by this; later layers add less than they pass on.
ROUNDING = 2.0**-20
# Of the effect of one change of the pictures by ROUNDING: effects of equal size vary by less.
_MARGIN = 8
# Of a bound: a network that amplifies rounding a thousand times would else be allowed any features.
_LARGEST = 2.0**-7
_SEED = 0
# Rows and columns of patches where positions are computed for any size. Not a square, of which
# every rule for the coordinates of the longer side finds the same.
_FEW_PATCHES = (3, 5)

Backbone = VisionTransformer | ConvNet


def compare_at_start(
    source: Backbone,
    target: Backbone,
    state: Mapping[str, Tensor],
    *,
    size: int,
    heartbeat: Callable[[], None] = lambda: None,
) -> StepZero:
    """Compare all tokens of the source with those of a run's backbone, on fixed pictures.

    At the run's size of crops, where the source resizes its positions by its own rule; with rotary
    positions, which know no size, of 3 x 5 patches. If the run has other channels, the pictures are
    gray, for which the adapted first layer is exact.

    Args:
        source: the network that was read, in eval mode.
        target: the run's, on the meta device; it gets the tensors of `state`.
        state: every tensor of the run's backbone.
        size: side of the run's global crops in pixels.
        heartbeat: called after each network.
    """
    target.load_state_dict(dict(state), assign=True)
    target.eval().requires_grad_(False)
    shape = (size, size)
    if isinstance(source, VisionTransformer) and source.rope is not None:
        rows, columns = _FEW_PATCHES
        shape = (rows * source.patch_size, columns * source.patch_size)
    theirs, ours = _pictures(input_channels(source), input_channels(target), shape=shape)
    with torch.inference_mode():
        expected, changed = _tokens(source, theirs).split(1)
        heartbeat()
        found = _tokens(target, ours)[:1]
        heartbeat()
    return StepZero(
        pictures=ours[:1],
        class_tokens=expected[:, 0].clone() if isinstance(source, VisionTransformer) else None,
        difference=relative_difference(found, expected),
        bound=min(_MARGIN * max(relative_difference(changed, expected), ROUNDING), _LARGEST),
    )


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of a token from the expected one, over the length of that; NaN if one is.

    Args:
        found: (..., D).
        expected: (..., D).
    """
    lengths = expected.norm(dim=-1).clamp(min=torch.finfo(expected.dtype).tiny)
    return float(((found - expected).norm(dim=-1) / lengths).max())  # max keeps a NaN


def input_channels(backbone: Backbone) -> int:
    """Channels of a picture that a backbone takes."""
    if isinstance(backbone, ConvNet):
        return backbone.in_chans
    first: Any = backbone.get_submodule("patch_embed.proj")
    return int(first.in_channels)


def _pictures(channels: int, of_run: int, *, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A picture and, after it, the same with every pixel changed by ROUNDING: (2, C, H, W) of both.

    Gray where the channels differ.
    """
    generator = torch.Generator().manual_seed(_SEED)
    drawn = channels if channels == of_run else 1
    picture = torch.randn(1, drawn, *shape, generator=generator)
    signs = torch.randint(0, 2, picture.shape, generator=generator) * 2 - 1
    both = torch.cat((picture, picture * (1 + ROUNDING * signs)))
    return both.expand(-1, channels, -1, -1), both.expand(-1, of_run, -1, -1)


def _tokens(backbone: Backbone, pictures: Tensor) -> Tensor:
    """All tokens through the final norm (N, L, D); of others their features (N, 1, D)."""
    if isinstance(backbone, ConvNet):
        features: Tensor = backbone([pictures])
        return features[:, None]
    return backbone.features(pictures)
