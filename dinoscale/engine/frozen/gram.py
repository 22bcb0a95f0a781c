"""The Gram network: an earlier teacher, frozen, whose patches stay the measure of similarity.

It begins as given weights, or as the EMA teacher at the first refresh, and each refresh overwrites
it with the EMA. Sharded like the teacher: partitioned at stage 3, whole on every rank at stages
0-2, and only in the compute dtype, since nothing averages it. A backbone of P parameters of s bytes
takes s P bytes, at stage 3 s P / W of W ranks and the layers in flight.

Source: Simeoni et al. 2025 (arXiv:2508.10104), section 4; when it is refreshed, the authors' code.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dinoscale.config.resolve import RunPlan
from dinoscale.config.schema import RunConfig
from dinoscale.config.sections.objectives import GramConfig
from dinoscale.engine.ds_config import teacher_config
from dinoscale.engine.frozen.weights import Partitioned
from dinoscale.engine.micro_batch import MicroBatch
from dinoscale.engine.shards import Fragment, Layout
from dinoscale.engine.student import Student, materialize
from dinoscale.losses.gram import resized
from dinoscale.models.network import PatchNetwork
from dinoscale.runtime import distributed
from dinoscale.runtime.float32 import tensor_cores

BACKBONE = "backbone."  # of names in a run's networks


def crop_size_of(config: RunConfig) -> int:
    """Side of the Gram network's crops in pixels."""
    return config.gram.crop_size or config.crops.global_size


def refreshes_after(step: int, rule: GramConfig, *, done: int) -> bool:
    """Whether zero-based `step` ends with a refresh, if there have been `done` of them."""
    every, most = rule.refresh_every_steps, rule.max_refreshes
    if every is None or (most is not None and done >= most):
        return False
    return step + 1 >= rule.first_refresh_step and (step + 1) % every == 0


class GramNetwork:
    """A frozen backbone, in evaluation mode, without gradient.

    Attributes:
        refreshes: how often it was overwritten with the EMA; None while there are no weights yet.
        own: compute dtype views of this rank's weights, one (numel,) view per fragment of the
            student's layout, None for one of a head.
    """

    def __init__(
        self, network: PatchNetwork, student: Student, config: RunConfig, plan: RunPlan
    ) -> None:
        """Allocate the weights.

        Args:
            network: a backbone of the student's architecture, on any device; its values are not
                used.
            student: gives the layout.
            config: of the run.
            plan: of the run.
        """
        self.refreshes: int | None = None
        self._rule, self._dtype = config.gram, student.compute_dtype
        self._partitioned: Partitioned[PatchNetwork] | None = None
        network.requires_grad_(False).eval()
        if config.engine.zero_stage == 3:
            layout = _of_backbone(student.layout)
            self._partitioned = Partitioned(
                network, layout, self._dtype, teacher_config(config, plan)
            )
            network = self._partitioned.network
        else:
            materialize(network, self._dtype)
        self._network = network
        for name, buffer in network.named_buffers():
            buffer.copy_(student.buffers()[name])
        self._parameters = dict(network.named_parameters())
        self._shapes = {name: student.shapes[name] for name in self._parameters}
        self.own = [self._view(fragment) for fragment in student.layout.fragments]
        pairs = zip(student.layout.fragments, self.own, strict=True)
        self._held = [(fragment, view) for fragment, view in pairs if view is not None]

    def _view(self, fragment: Fragment) -> Tensor | None:
        """A fragment's elements, at stage 3 in this rank's partition."""
        if fragment.name not in self._parameters:
            return None
        if self._partitioned is not None:
            return self._partitioned.partition(fragment)
        whole = self._parameters[fragment.name].data
        return whole.view(-1).narrow(0, fragment.start, fragment.numel)

    @torch.no_grad()
    def features(self, batch: MicroBatch) -> Tensor | None:
        """Patch features of the Gram crops on the student's grid, (2 * B, P, D).

        None while there are no weights yet.
        """
        if self.refreshes is None:
            return None
        assert batch.gram_crops is not None
        images = batch.gram_crops.flatten(0, 1).to(self._dtype)
        forward = self._network if self._partitioned is None else self._partitioned.forward
        with tensor_cores(self._dtype, images.device):
            features: Tensor = forward(images)
        side = batch.global_crops.shape[-1] // self._network.backbone.patch_size
        return resized(features, num_patches=side**2)

    def update(self, step: int, ema: Sequence[Tensor]) -> None:
        """Refresh the weights if that is due.

        Also after a step that was skipped, whose average is that of the step before: the authors'
        code counts steps, and whether one was skipped is known on the device only.

        Args:
            step: zero-based optimizer step that was just taken.
            ema: float32 views of the average, as in `Teacher`.
        """
        if refreshes_after(step, self._rule, done=self.refreshes or 0):
            self.refresh(ema)

    @torch.no_grad()
    def refresh(self, ema: Sequence[Tensor]) -> None:
        """Overwrite the weights with the average; collective."""
        for view, average in zip(self.own, ema, strict=True):
            if view is not None:
                view.copy_(average)
        self._share()
        self.refreshes = 1 if self.refreshes is None else self.refreshes + 1

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor] | None) -> None:
        """Begin with given weights; collective.

        Args:
            weights: on rank 0, every tensor of the backbone by name, on the CPU; ignored on other
                ranks.
        """
        held = {fragment.name: (fragment, view) for fragment, view in self._held}
        for name, shape in self._shapes.items():
            value = torch.empty(shape)
            if weights is not None and distributed.rank() == 0:
                value.copy_(weights[name.removeprefix(BACKBONE)])
            distributed.broadcast(value)
            if name in held:
                fragment, view = held[name]
                view.copy_(value.flatten().narrow(0, fragment.start, fragment.numel))
        self._share()
        self.refreshes = 0

    @torch.no_grad()
    def restore(self, read: Callable[[str, int, int], Tensor], refreshes: int | None) -> None:
        """Set the weights from full tensors; collective.

        Args:
            read: (parameter name, first element, count) -> (count,) float32.
            refreshes: of the checkpoint; None if it has no Gram network. Weights that were given
                then stay, those of a refresh that came later are forgotten.

        Raises:
            DinoscaleError: on every rank, if `read` raises it on one.
        """
        if refreshes is None:
            self.refreshes = 0 if self.refreshes == 0 else None
            return

        def set_all() -> None:
            for fragment, view in self._held:
                view.copy_(read(fragment.name, fragment.start, fragment.numel))

        distributed.together(set_all)
        self._share()
        self.refreshes = refreshes

    def _share(self) -> None:
        """Give every rank what the forward needs of the others' weights."""
        if self._partitioned is not None:
            self._partitioned.forget_copies()
            return
        held = {fragment.name: (fragment, view) for fragment, view in self._held}
        for name, parameter in self._parameters.items():
            whole = torch.zeros(parameter.shape, device=parameter.device)
            if name in held:
                fragment, view = held[name]
                whole.view(-1).narrow(0, fragment.start, fragment.numel).copy_(view)
            parameter.copy_(distributed.all_reduce_sum(whole))  # of zeros but for one rank

    def num_bytes(self) -> int:
        """Bytes that this rank holds."""
        if self._partitioned is not None:
            return self._partitioned.num_bytes()
        return sum(weight.numel() * weight.element_size() for weight in self._parameters.values())


def _of_backbone(layout: Layout) -> Layout:
    fragments = tuple(f for f in layout.fragments if f.name.startswith(BACKBONE))
    return Layout(fragments, layout.shard_sizes, ())
