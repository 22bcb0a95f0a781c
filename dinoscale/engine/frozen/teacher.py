"""A frozen teacher of distillation: backbone and heads of another run, whose targets are learnt.

It may differ from the student in all but the numbers of prototypes and what an image is. Sharded
like the teacher: partitioned at stage 3, whole on every rank at stages 0-2, and only in the compute
dtype, since nothing averages it: s P bytes of P weights of s bytes, at stage 3 s P / W of W ranks
and the layers in flight.

Source: Oquab et al. 2023 (arXiv:2304.07193), section 5; Simeoni et al. 2025 (arXiv:2508.10104),
section 5.2.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dinoscale.config.resolve import RunPlan
from dinoscale.config.schema import RunConfig
from dinoscale.engine.ds_config import teacher_config
from dinoscale.engine.frozen.seen import Seen
from dinoscale.engine.frozen.weights import Partitioned
from dinoscale.engine.micro_batch import MicroBatch
from dinoscale.engine.shards import Layout
from dinoscale.engine.student import materialize
from dinoscale.losses.patch_grid import resized
from dinoscale.models.network import DinoNetwork, Objective
from dinoscale.runtime import distributed
from dinoscale.runtime.float32 import tensor_cores

Network = TypeVar("Network", bound=nn.Module)


class DistillingNetwork(DinoNetwork):
    """A network whose chosen patches are those of the student's grid.

    With patches of another size in pixels its patch tokens, after the final norm, are resized
    bicubically to that grid before any is chosen, as those of a Gram network are.
    """

    def __init__(self, network: DinoNetwork, *, patch_size: int | None) -> None:
        """Take its parts; `patch_size` is the student's in pixels, None without patches."""
        super().__init__(network.backbone, network.head, network.patch_head)
        own = getattr(network.backbone, "patch_size", None)
        self._patch_size = None if patch_size == own else patch_size

    def forward(
        self,
        crops: Sequence[Tensor],
        keep: Tensor | None = None,
        objective: Objective | None = None,
        masks: Tensor | None = None,
        patch_rows: Tensor | None = None,
        coordinates: Tensor | None = None,
    ) -> Tensor:
        """As `DinoNetwork.forward`; with an objective that wants class tokens and chosen patches.

        `patch_rows` are indices into the patches of the student's grid.
        """
        if objective is None or patch_rows is None or self._patch_size is None:
            return super().forward(crops, keep, objective, masks, patch_rows, coordinates)
        tokens, patches = self.backbone(crops, keep, all_patches=True)
        side = crops[0].shape[-1] // self._patch_size
        on_grid = resized(patches, num_patches=side**2, interpolation="bicubic")
        chosen = on_grid.to(patches.dtype).flatten(0, 1).index_select(0, patch_rows)
        return torch.stack(self._of_heads(tokens, chosen, objective)).sum()


class FrozenTeacher(Generic[Network]):
    """A network in evaluation mode, without gradient and without stochastic depth.

    Batch norm, if there is any, takes the statistics that it has tracked.

    Attributes:
        identity: digest of its weights as they were read, on rank 0; None until they are there.
    """

    def __init__(
        self, network: Network, config: RunConfig, plan: RunPlan, dtype: torch.dtype
    ) -> None:
        """Allocate the weights, all zero.

        Args:
            network: on any device; its values are not used.
            config: of the run.
            plan: of the run.
            dtype: of the weights.
        """
        self.identity: str | None = None
        self._dtype = dtype
        network.requires_grad_(False).eval()
        self._shapes = {name: value.shape for name, value in network.named_parameters()}
        self._partitioned: Partitioned[Network] | None = None
        if config.engine.zero_stage == 3:
            none = Layout((), (), ())  # its partitions are its own
            self._partitioned = Partitioned(network, none, dtype, teacher_config(config, plan))
            network = self._partitioned.network
        else:
            materialize(network, dtype)
        self._network = network
        self._parameters: dict[str, Any] = dict(network.named_parameters())
        self._buffers = dict(network.named_buffers())
        for value in (*(self._own(name)[1] for name in self._shapes), *self._buffers.values()):
            value.zero_()

    def forward(self, *inputs: Any) -> Any:
        """The network's result; collective at stage 3."""
        forward = self._network if self._partitioned is None else self._partitioned.forward
        return forward(*inputs)

    def look(self, batch: MicroBatch, seen: Seen) -> None:
        """Show what its heads make of a micro-batch; collective at stage 3."""
        images = batch.global_crops.flatten(0, 1).to(self._dtype)
        rows = None if batch.masks is None else batch.masks.rows
        with tensor_cores(self._dtype, images.device):
            self.forward([images], None, seen, None, rows)

    def _own(self, name: str) -> tuple[int, Tensor]:
        """First element of a parameter that this rank holds, and what it holds, maybe padded."""
        parameter = self._parameters[name]
        if self._partitioned is None:
            return 0, parameter.data.view(-1)
        partition: Tensor = parameter.ds_tensor.data
        return distributed.rank() * partition.numel(), partition

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor] | None, *, identity: str | None) -> None:
        """Set all weights; collective.

        Args:
            weights: on rank 0, every tensor by name, on the CPU; ignored on other ranks.
            identity: of them, on rank 0.
        """

        def given(name: str, like: Tensor) -> Tensor:
            if weights is not None and distributed.rank() == 0:
                like.copy_(weights[name])
            distributed.broadcast(like)
            return like

        for name, shape in self._shapes.items():
            value = given(name, torch.empty(shape))
            start, own = self._own(name)
            part = value.flatten()[start : start + own.numel()]  # without padding
            own[: len(part)].copy_(part)
        for name, buffer in self._buffers.items():
            buffer.copy_(given(name, torch.empty_like(buffer, device="cpu")))
        if self._partitioned is not None:
            self._partitioned.forget_copies()
        self.identity = identity

    def num_bytes(self) -> int:
        """Bytes that this rank holds."""
        return sum(own.numel() * own.element_size() for _, own in map(self._own, self._shapes))
