"""The weights of a network without a gradient, derived from shards in the student's layout.

Stages 0-2 keep a copy of all weights in the compute dtype, refreshed by one all-gather per group
that overlaps with the preparation of the next batch; stage 3 keeps them partitioned as the student
is and gathers layer by layer.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dinoscale.data.transfer import StagingBuffers
from dinoscale.engine.gradients import compute_device
from dinoscale.engine.shards import Fragment, Layout
from dinoscale.engine.student import import_deepspeed, materialize
from dinoscale.errors import LostPeerError, OutOfStepError
from dinoscale.models.sync_bn import cast_weights
from dinoscale.runtime import distributed

Network = TypeVar("Network", bound=nn.Module)
Part = TypeVar("Part", bound=nn.Module)


class Replicated(Generic[Network]):
    """Stages 0-2: every rank holds all weights, views into one flat tensor per group."""

    def __init__(
        self,
        network: Network,
        layout: Layout,
        dtype: torch.dtype,
        *,
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Allocate the weights.

        Args:
            network: on any device; its values are not used.
            layout: of the shards from which they follow.
            dtype: of the weights.
            shared: weights that are in no shard, whose memory it uses.
        """
        self.network, self._layout = network, layout
        world_size, device = distributed.world_size(), compute_device()
        self._flats = [
            torch.zeros(size * world_size, dtype=dtype, device=device)
            for size in layout.shard_sizes
        ]
        self._pending: list[Callable[[], None]] = []
        self._staged = StagingBuffers()
        views = {
            place.name: self._flats[place.group]
            .narrow(0, place.offset, place.numel)
            .view(place.shape)
            for place in layout.placements
        }
        views |= {
            name: torch.empty_like(buffer, device=device)
            for name, buffer in network.named_buffers()
        }
        views |= {name: weight.detach() for name, weight in (shared or {}).items()}
        network.load_state_dict(views, assign=True)
        self.buffers = dict(network.named_buffers())

    def forward(self, *inputs: Any) -> Any:
        """The network's result."""
        self.wait()
        return self.network(*inputs)

    def publish(self, average: Sequence[Tensor]) -> None:
        """Start to refresh the weights from the shards; other work overlaps until their use."""
        self.wait()
        rank = distributed.rank()
        own = [
            flat.narrow(0, rank * size, size)
            for flat, size in zip(self._flats, self._layout.shard_sizes, strict=True)
        ]
        self._staged.copy(own, average)
        gathers = zip(self._flats, own, strict=True)
        self._pending = [distributed.begin_all_gather_flat(*gather) for gather in gathers]

    def wait(self) -> None:
        """Wait for the all-gather that `publish` began."""
        for finish in self._pending:
            finish()
        self._pending = []

    def plain(self, part: Callable[[Network], Part]) -> Part:
        """A part of the network itself."""
        self.wait()
        return part(self.network)

    def num_bytes(self) -> int:
        """Bytes of this rank's weights."""
        return sum(flat.numel() * flat.element_size() for flat in self._flats)


class Partitioned(Generic[Network]):
    """Stage 3: an engine without optimizer whose partitions are the student's, slice by slice."""

    def __init__(
        self,
        network: Network,
        layout: Layout,
        dtype: torch.dtype,
        deepspeed_config: dict[str, Any],
    ) -> None:
        """The same; the partitions are at least as large as the fragments of `layout`."""
        self._skeleton = copy.deepcopy(network).to("meta")
        cast_weights(self._skeleton, dtype)
        materialize(network, dtype, zero3_config=deepspeed_config)
        self._engine, *_ = import_deepspeed().initialize(
            model=network, config=deepspeed_config, dist_init_required=False
        )
        self.network: Network = self._engine.module
        self._layout, self._staged = layout, StagingBuffers()
        self.buffers = dict(self.network.named_buffers())
        self._parameters: dict[str, Any] = dict(self.network.named_parameters())
        for fragment in layout.fragments:
            own = self._parameters[fragment.name].ds_tensor.numel()
            assert own >= fragment.numel, f"{fragment.name}: not partitioned like the student's"

    def forward(self, *inputs: Any) -> Any:
        """The network's result."""
        return distributed.guarded(lambda: self._engine(*inputs))

    def publish(self, average: Sequence[Tensor]) -> None:
        """Write the shards into the partitions."""
        fragments = self._layout.fragments
        partitions = [self.partition(fragment) for fragment in fragments]
        if partitions:
            here = average
            if average[0].device != partitions[0].device:  # offloaded: copy this rank's shards over
                here = [
                    torch.empty_like(a, device=compute_device(), dtype=partitions[0].dtype)
                    for a in average
                ]
                self._staged.copy(here, average)
            torch._foreach_copy_(partitions, [fragment.of(here) for fragment in fragments])
        self.forget_copies()

    def partition(self, fragment: Fragment) -> Tensor:
        """A fragment's elements in this rank's partition of its parameter, as a view (numel,)."""
        whole: Tensor = self._parameters[fragment.name].ds_tensor.data
        return whole.narrow(0, 0, fragment.numel)

    def forget_copies(self) -> None:
        """Forget the second copy that a node has with hpZ; call it once the weights have changed.

        DeepSpeed drops it in the student's step only.
        """
        for parameter in self._parameters.values():
            parameter.ds_secondary_tensor = None

    def plain(self, part: Callable[[Network], Part]) -> Part:
        """A copy of a part of the network, whole on every rank, freed when the caller drops it.

        Raises:
            RunFailedError: another rank has no memory for it; that one raises its own error.
            OutOfStepError: this rank failed while the ranks gathered.
        """
        empty, here = part(self._skeleton), part(self.network)
        plain = distributed.together(lambda: copy.deepcopy(empty).to_empty(device=compute_device()))
        zero = import_deepspeed().zero
        for buffer, own in zip(plain.buffers(), here.buffers(), strict=True):
            buffer.copy_(own)
        try:
            for parameter, own in zip(plain.parameters(), here.parameters(), strict=True):
                with zero.GatheredParameters([own]):
                    parameter.data.copy_(own.data)
        except LostPeerError:
            raise
        except Exception as error:  # the memory for a whole parameter, which no rank has agreed on
            raise OutOfStepError(f"cannot gather the teacher's weights: {error}") from error
        return plain

    def wait(self) -> None:
        """Nothing: weights are gathered only when a layer runs."""

    def num_bytes(self) -> int:
        """Bytes of this rank's partitions."""
        parts = [parameter.ds_tensor for parameter in self._parameters.values()]
        return sum(part.numel() * part.element_size() for part in parts)
