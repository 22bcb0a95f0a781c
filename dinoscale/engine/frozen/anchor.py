"""The anchor: the network as the run began, frozen, whose features the student's stay near.

It runs over the global crops as the student sees them where nothing is masked: with the same
stochastic depth and the same changes of rotary coordinates, so that both find the same features
until the student has moved. How it is sharded: `frozen/network.py`.
"""

from dinoscale.engine.frozen.network import FrozenBackbone
from dinoscale.engine.micro_batch import AnchorTargets, MicroBatch


def anchor_targets(backbone: FrozenBackbone, batch: MicroBatch) -> AnchorTargets:
    """Features of the global crops, none of their patches masked."""
    images = batch.global_crops.flatten(0, 1)
    # Global crops come first among the crops of an image, and among the resolutions.
    keep = None if batch.keep is None else batch.keep[..., : len(images)]
    return AnchorTargets(*backbone.tokens(images, keep, batch.coordinates))
