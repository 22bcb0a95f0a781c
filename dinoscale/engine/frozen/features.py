"""A frozen teacher without heads: the features of any backbone, which the student's follow.

It sees the global crops as they are, in evaluation mode: without masks, stochastic depth or changes
of rotary coordinates, whatever the student has. Patches of another size in pixels make another
grid, whose features are resized bilinearly to the student's; a convolutional network has a grid of
the places of its last map. How it is sharded: `teacher.py`.
Source: [D] ours.
"""

import torch

from dinoscale.config.resolve import RunPlan
from dinoscale.config.schema import RunConfig
from dinoscale.engine.frozen.teacher import FrozenTeacher
from dinoscale.engine.micro_batch import FeatureTargets, MicroBatch
from dinoscale.losses.patch_grid import resized
from dinoscale.models.network import FeatureNetwork
from dinoscale.runtime.float32 import tensor_cores


class FeatureTeacher(FrozenTeacher[FeatureNetwork]):
    """The backbone and the features that it gives a student."""

    def __init__(
        self, network: FeatureNetwork, config: RunConfig, plan: RunPlan, dtype: torch.dtype
    ) -> None:
        """Allocate the weights, all zero; arguments as of `FrozenTeacher`."""
        super().__init__(network, config, plan, dtype)
        self._patch_size = config.model.effective_patch_size

    @torch.no_grad()
    def targets(self, batch: MicroBatch) -> FeatureTargets:
        """Features of the global crops; collective at stage 3."""
        images = batch.global_crops.flatten(0, 1)
        with tensor_cores(self._dtype, images.device):
            classes, patches = self.forward(images.to(self._dtype))
        if patches is not None:
            assert self._patch_size is not None  # the student has patches, too
            side = images.shape[-1] // self._patch_size
            patches = resized(patches, num_patches=side**2, interpolation="bilinear")
        return FeatureTargets(classes, patches)
