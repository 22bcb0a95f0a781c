"""Which elements of which parameter lie in this rank's shard, at every ZeRO stage.

EMA, per-tensor clipping and checkpoints all use this one list. W ranks.

Stages 0-2 concatenate the parameters of a group, pad to a multiple of W and partition the result
into W equal slices, so a slice may begin inside a parameter. Stage 3 partitions every parameter
into W slices. At stage 0 DeepSpeed shards nothing; the same partition shards the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of one parameter inside this rank's shard of its group.

    Attributes:
        name: the parameter's name in the network.
        shape: the parameter's full shape.
        group: index of the shard (optimizer group; sub-group at stage 3).
        start: first element within the flattened parameter.
        numel: number of elements.
        offset: first element within the shard.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    start: int
    numel: int
    offset: int

    def of(self, shards: Sequence[Tensor]) -> Tensor:
        """The fragment's elements in `shards`, one flat tensor per group, as a view (numel,)."""
        return shards[self.group].narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class Placement:
    """Position of one parameter in the unsharded flat tensor of its group (stages 0-2)."""

    name: str
    shape: tuple[int, ...]
    group: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """This rank's fragments, shard sizes, and at stages 0-2 the placements of all parameters."""

    fragments: tuple[Fragment, ...]
    shard_sizes: tuple[int, ...]
    placements: tuple[Placement, ...]


def end_to_end(groups: Sequence[Sequence[tuple[str, Tensor]]], world_size: int) -> Layout:
    """The layout of stages 1 and 2 for parameters that DeepSpeed does not shard (stage 0)."""
    placements, sizes = [], []
    for index, group in enumerate(groups):
        offset = 0
        for name, parameter in group:
            numel = parameter.numel()
            placements.append(Placement(name, tuple(parameter.shape), index, offset, numel))
            offset += numel
        sizes.append(-(-offset // world_size))
    return _partition(placements, sizes)


def of_flat_optimizer(optimizer: Any, names: dict[int, str]) -> Layout:
    """The layout of DeepSpeed's stage 1 and 2 optimizer, read from the addresses of its tensors.

    Args:
        optimizer: DeepSpeedZeroOptimizer.
        names: id of parameter -> name.
    """
    placements, sizes = [], []
    for index, flat in enumerate(optimizer.bit16_groups_flat):
        for parameter in optimizer.bit16_groups[index]:
            offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            shape, numel = tuple(parameter.shape), parameter.numel()
            placements.append(Placement(names[id(parameter)], shape, index, offset, numel))
        sizes.append(optimizer.single_partition_of_fp32_groups[index].numel())
    return _partition(placements, sizes)


def of_partitioned_optimizer(optimizer: Any, names: dict[int, str], rank: int) -> Layout:
    """The layout of DeepSpeed's stage 3 optimizer: every parameter padded and partitioned by rank.

    Args:
        optimizer: DeepSpeedZeroOptimizer_Stage3.
        names: id of parameter -> name.
        rank: rank in the sharding group.
    """
    fragments, sizes = [], []
    for index, parameters in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = rank * size
            numel = max(0, min(size, parameter.ds_numel - start))  # the tail is padding
            shape = tuple(parameter.ds_shape)
            if numel:
                name = names[id(parameter)]
                fragments.append(Fragment(name, shape, index, start, numel, offset))
            offset += size
        sizes.append(offset)
    return Layout(tuple(fragments), tuple(sizes), ())


def _partition(placements: list[Placement], sizes: list[int]) -> Layout:
    from dinoscale.runtime import distributed

    rank, fragments = distributed.rank(), []
    for place in placements:
        begin = rank * sizes[place.group]
        first = max(place.offset, begin)
        last = min(place.offset + place.numel, begin + sizes[place.group])
        if first < last:
            fragments.append(
                Fragment(
                    place.name,
                    place.shape,
                    place.group,
                    start=first - place.offset,
                    numel=last - first,
                    offset=first - begin,
                )
            )
    return Layout(tuple(fragments), tuple(sizes), tuple(placements))


def parameter_names(network: nn.Module) -> dict[int, str]:
    """Id of parameter -> name; DeepSpeed changes parameters but keeps the objects."""
    return {id(parameter): name for name, parameter in network.named_parameters()}


def empty_shards(layout: Layout, *, device: torch.device) -> list[Tensor]:
    """Float32 zeros of the shard sizes, one flat tensor per group."""
    return [torch.zeros(size, device=device) for size in layout.shard_sizes]
