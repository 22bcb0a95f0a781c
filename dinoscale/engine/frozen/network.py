"""A frozen backbone beside student and teacher, whose features the student's are compared with.

Sharded like the teacher: partitioned at stage 3, whole on every rank at stages 0-2, and only in the
compute dtype, since nothing averages it. A backbone of P parameters of s bytes takes s P bytes, at
stage 3 s P / W of W ranks and the layers in flight. Weights that do not train are the student's.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dinoscale.config.resolve import RunPlan
from dinoscale.config.schema import RunConfig
from dinoscale.engine.ds_config import teacher_config
from dinoscale.engine.frozen.weights import Partitioned
from dinoscale.engine.shards import Fragment, Layout
from dinoscale.engine.student import Student, materialize
from dinoscale.models.network import TokenNetwork
from dinoscale.runtime import distributed
from dinoscale.runtime.float32 import tensor_cores

BACKBONE = "backbone."  # of names in a run's networks


class FrozenBackbone:
    """A backbone in evaluation mode, without gradient.

    Attributes:
        network: the network that computes; its weights may be partitioned.
        own: compute dtype views of this rank's weights, but for those that do not train, one
            (numel,) view per fragment of the student's layout, None for one of a head.
    """

    def __init__(
        self, network: TokenNetwork, student: Student, config: RunConfig, plan: RunPlan
    ) -> None:
        """Allocate the weights.

        Args:
            network: a backbone of the student's architecture, on any device; its values are not
                used.
            student: gives the layout.
            config: of the run.
            plan: of the run.
        """
        self._dtype = student.compute_dtype
        self._partitioned: Partitioned[TokenNetwork] | None = None
        network.requires_grad_(False).eval()
        if config.engine.zero_stage == 3:
            layout = _of_backbone(student.layout)
            self._partitioned = Partitioned(
                network, layout, self._dtype, teacher_config(config, plan)
            )
            network = self._partitioned.network
        else:
            materialize(network, self._dtype)
        self.network = network
        shared = student.frozen.parameters
        for name, parameter in network.named_parameters():
            if name in shared:  # they are those of the start, too
                parameter.data = shared[name].data
        for name, buffer in network.named_buffers():
            buffer.copy_(student.buffers()[name])
        self._parameters = {
            name: parameter for name, parameter in network.named_parameters() if name not in shared
        }
        self._shapes = {name: student.shapes[name] for name in self._parameters}
        self.own = [self._view(fragment) for fragment in student.layout.fragments]
        pairs = zip(student.layout.fragments, self.own, strict=True)
        self._held = {
            fragment.name: (fragment, view) for fragment, view in pairs if view is not None
        }

    def _view(self, fragment: Fragment) -> Tensor | None:
        """A fragment's elements, at stage 3 in this rank's partition."""
        if fragment.name not in self._parameters:
            return None
        if self._partitioned is not None:
            return self._partitioned.partition(fragment)
        whole = self._parameters[fragment.name].data
        return whole.view(-1).narrow(0, fragment.start, fragment.numel)

    @torch.no_grad()
    def tokens(
        self, images: Tensor, keep: Tensor | None = None, coordinates: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Class tokens (N, D) and patch tokens (N, P, D) of images (N, C, H, W), normalised pixels.

        `keep` and `coordinates` are those of `VisionTransformer.forward`. Collective at stage 3.
        """
        forward = self.network if self._partitioned is None else self._partitioned.forward
        with tensor_cores(self._dtype, images.device):
            tokens: tuple[Tensor, Tensor] = forward(images.to(self._dtype), keep, coordinates)
        return tokens

    @torch.no_grad()
    def take(self, values: Sequence[Tensor]) -> None:
        """Overwrite the weights with float32 views, one per fragment of the layout; collective."""
        for view, value in zip(self.own, values, strict=True):
            if view is not None:
                view.copy_(value)
        self._share()

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor] | None) -> None:
        """Overwrite them with given weights; collective.

        Args:
            weights: on rank 0, every tensor of the backbone by name, on the CPU; ignored on other
                ranks.
        """
        for name, shape in self._shapes.items():
            value = torch.empty(shape)
            if weights is not None and distributed.rank() == 0:
                value.copy_(weights[name.removeprefix(BACKBONE)])
            distributed.broadcast(value)
            if name in self._held:
                fragment, view = self._held[name]
                view.copy_(value.flatten().narrow(0, fragment.start, fragment.numel))
        self._share()

    @torch.no_grad()
    def restore(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Set the weights from full tensors; collective.

        Args:
            read: (parameter name, first element, count) -> (count,) float32.

        Raises:
            DinoscaleError: on every rank, if `read` raises it on one.
        """

        def set_all() -> None:
            for fragment, view in self._held.values():
                view.copy_(read(fragment.name, fragment.start, fragment.numel))

        distributed.together(set_all)
        self._share()

    def _share(self) -> None:
        """Give every rank what the forward needs of the others' weights."""
        if self._partitioned is not None:
            self._partitioned.forget_copies()
            return
        for name, parameter in self._parameters.items():
            whole = torch.zeros(parameter.shape, device=parameter.device)
            if name in self._held:
                fragment, view = self._held[name]
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
