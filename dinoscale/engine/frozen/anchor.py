"""The anchor: the network as the run began, frozen, whose features the student's stay near.

It runs over the global crops as the student sees them where nothing is masked: with the same
stochastic depth and the same changes of rotary coordinates, so that both find the same features
until the student has moved: exactly where both run the same kernels, else up to
rounding, as in bf16. How it is sharded: `frozen/network.py`.
"""

from collections.abc import Mapping
from typing import Any

from dinoscale.config import RunConfig
from dinoscale.engine.frozen.network import FrozenBackbone
from dinoscale.engine.micro_batch import AnchorTargets, MicroBatch


def anchor_targets(backbone: FrozenBackbone, batch: MicroBatch) -> AnchorTargets:
    """Features of the global crops, none of their patches masked."""
    images = batch.global_crops.flatten(0, 1)
    # Global crops come first among the crops of an image, and among the resolutions.
    keep = None if batch.keep is None else batch.keep[..., : len(images)]
    return AnchorTargets(*backbone.tokens(images, keep, batch.coordinates))


def anchor_caution(config: RunConfig, then: Mapping[str, Any] | None) -> str | None:
    """A warning if an anchor that was rounded, and is stored so, goes on in float32.

    Args:
        config: of the run.
        then: configuration in the checkpoint that the anchor comes from; None for another source.

    Returns:
        A sentence; None without an anchor or if it is as exact as the student.
    """
    if then is None or not config.anchor.counts:
        return None
    if (then["engine"]["precision"], config.engine.precision) != ("bf16", "fp32"):
        return None
    return (
        "the anchor stays rounded to bf16, in which the checkpoint stores it, while the student"
        " goes on in float32: the anchor's terms hold that rounding, too"
    )
