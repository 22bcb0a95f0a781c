"""The order of images in shards that are read from front to back, by many readers side by side.

The shards are permuted anew each time all of them have been read, and an epoch is a stretch of this
endless sequence. It is cut into lanes, W for each micro-batch of a step: step s takes micro-batch j
from lane (s mod W, j). Within a lane, the images of each block of neighbours are permuted. So a
lane is read from front to back, by the worker that serves every W-th step, and the order does not
depend on workers or ranks.
"""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from dinoscale.data.order.permutation import Permutation
from dinoscale.data.order.sampler import Draws, StepSampler
from dinoscale.data.seeding import Stream, generator
from dinoscale.data.shards.stream import Blocks

_KEPT_ORDERS = 2  # of shards: an epoch may begin in one and end in the next


class StreamSampler(StepSampler):
    """The images of every optimizer step, over all ranks, from shards read in lanes.

    Args:
        blocks: the shards.
        quota: images of an epoch, >= batch_size.
        lanes: W, lanes for each micro-batch of a step.
        batch_size: images of one optimizer step over all ranks.
        micro_batch_size: images of one rank in one forward.
        world_size: number of ranks; divides batch_size / micro_batch_size.
        seed: seed of the run, >= 0.

    Raises:
        ValueError: the numbers are inconsistent.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        quota: int,
        lanes: int,
        batch_size: int,
        micro_batch_size: int,
        world_size: int,
        seed: int,
    ):
        super().__init__(
            sizes=[int(blocks.starts[-1])],
            quotas=[quota],
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            world_size=world_size,
            seed=seed,
        )
        self._blocks = blocks
        self._lanes = lanes
        self._shard_orders: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]
        self._shard_orders = OrderedDict()

    def step(self, step: int) -> Draws:
        """The images of one optimizer step over all ranks."""
        slots = range(self.batch_size // self.micro_batch_size)
        parts = [self._of_slot(step, slot) for slot in slots]
        return Draws(
            np.concatenate([draws.ids for draws in parts]),
            np.concatenate([draws.repeats for draws in parts]),
        )

    def _of_slot(self, step: int, slot: int) -> Draws:
        epoch, within = divmod(step, self.steps_per_epoch)
        step_in_lane, group = divmod(within, self._lanes)
        lane = self._lane(epoch, group, slot)
        first = lane.start + step_in_lane * self.micro_batch_size
        number = group * (self.batch_size // self.micro_batch_size) + slot
        ids: list[NDArray[np.int64]] = []
        repeats: list[NDArray[np.int64]] = []
        at, stop = first, first + self.micro_batch_size
        while at < stop:
            stretch, start_id = self._stretch(at, lane)
            places = np.arange(at, min(stop, stretch.stop)) - stretch.start
            block = self._blocks.block_of(start_id)
            rng = generator(self._seed, Stream.LANES, epoch, number, *divmod(block.start, 2**32))
            ids.append(start_id + Permutation(len(stretch), rng)(places))
            repeats.append(np.full(len(places), at // self._sizes[0]))
            at = stretch.stop
        return Draws(np.concatenate(ids), np.concatenate(repeats))

    def _lane(self, epoch: int, group: int, slot: int) -> range:
        """The part of the endless sequence that the steps of a lane take."""
        whole, more = divmod(self.steps_per_epoch, self._lanes)
        steps = whole + (group < more)
        before = (group * whole + min(group, more)) * self.batch_size
        start = epoch * self._quotas[0] + before + slot * steps * self.micro_batch_size
        return range(start, start + steps * self.micro_batch_size)

    def _stretch(self, at: int, lane: range) -> tuple[range, int]:
        """The part of a lane in one block around a place, and the number of its first image."""
        repeat, place = divmod(at, self._sizes[0])
        order, ends = self._shard_order(repeat)
        position = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[position])
        first_of_shard = at - place + int(ends[position] - self._blocks.counts[shard])
        start_id = int(self._blocks.starts[shard])
        block = self._blocks.block_of(start_id + at - first_of_shard)
        shift = first_of_shard - start_id  # from the number of an image to its place
        start, stop = max(block.start + shift, lane.start), min(block.stop + shift, lane.stop)
        return range(start, stop), start - shift

    def _shard_order(self, repeat: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of the shards in permutation number `repeat`, and where each ends."""
        if repeat not in self._shard_orders:
            if len(self._shard_orders) >= _KEPT_ORDERS:
                self._shard_orders.popitem(last=False)
            counts = self._blocks.counts
            rng = generator(self._seed, Stream.ORDER, 0, repeat)
            order = Permutation(len(counts), rng)(np.arange(len(counts)))
            self._shard_orders[repeat] = order, np.cumsum(counts[order])
        return self._shard_orders[repeat]
