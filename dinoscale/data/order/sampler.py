"""Which image is read when: a function of (seed, step), so that the saved state is one integer.

A source is drawn in an endless sequence of permutations of its images: draw number d of N images is
place d mod N of permutation d // N, so after any number of draws the counts of two images differ by
at most one. An epoch takes a quota of draws from each source; if the quota is the whole source, an
epoch is one permutation. Quotas are spread evenly over the steps of an epoch. The images of a step
do not depend on the number of processes or on the accumulation, only their split does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinoscale.data.order.permutation import Permutation
from dinoscale.data.seeding import Stream, generator


@dataclass(frozen=True, eq=False)
class Draws:
    """Images in the order in which they are drawn.

    Attributes:
        ids: int64 (B,), numbers of the images; those of a second source follow the first one's.
        repeats: int64 (B,), how often each image was drawn before: the finished permutations of its
            source. Equals the epoch where an epoch is one permutation.
    """

    ids: NDArray[np.int64]
    repeats: NDArray[np.int64]

    def __getitem__(self, part: slice) -> "Draws":
        return Draws(self.ids[part], self.repeats[part])


class StepSampler:
    """The images of every optimizer step, over all ranks.

    The tail of an epoch that does not fill a step is dropped. Differs, for exact resume: in the
    reference each process drops its own tail, so the dropped images depend on the world size.

    Args:
        sizes: images of each source, >= 1.
        quotas: draws from each source in an epoch, >= 1; their sum >= batch_size.
        batch_size: images of one optimizer step over all ranks.
        micro_batch_size: images of one rank in one forward.
        world_size: number of ranks; divides batch_size / micro_batch_size.
        seed: seed of the run, >= 0.

    Raises:
        ValueError: the numbers are inconsistent.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int],
        quotas: Sequence[int],
        batch_size: int,
        micro_batch_size: int,
        world_size: int,
        seed: int,
    ):
        if min(*sizes, *quotas, batch_size, micro_batch_size, world_size) < 1 or seed < 0:
            raise ValueError(
                "need sizes, quotas, batch_size, micro_batch_size, world_size >= 1 and seed >= 0; "
                f"got {sizes}, {quotas}, {batch_size}, {micro_batch_size}, {world_size}, {seed}"
            )
        if batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size} x world_size {world_size}"
            )
        if sum(quotas) < batch_size:
            raise ValueError(f"{sum(quotas)} images do not fill one batch of {batch_size}")
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.world_size = world_size
        self._sizes, self._quotas = tuple(sizes), tuple(quotas)
        self._seed = seed
        self._last: tuple[int, Draws] | None = None  # the step requested last

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one epoch."""
        return sum(self._quotas) // self.batch_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.batch_size // (self.micro_batch_size * self.world_size)

    def step(self, step: int) -> Draws:
        """The images of one optimizer step over all ranks.

        Returns:
            batch_size draws; from each source its share of the epoch, rounded.
        """
        if self._last is None or self._last[0] != step:
            self._last = step, self._drawn(step)
        return self._last[1]

    def micro_batch(self, step: int, *, micro_batch: int, rank: int) -> Draws:
        """The images that one rank takes in one forward of a step.

        Returns:
            micro_batch_size draws; over all ranks and micro-batches they make up `step`.
        """
        if not (0 <= rank < self.world_size and 0 <= micro_batch < self.accumulation_steps):
            raise ValueError(
                f"no micro-batch {micro_batch} of rank {rank}: there are "
                f"{self.accumulation_steps} of {self.world_size} ranks"
            )
        return self._of_slot(step, micro_batch * self.world_size + rank)

    def _of_slot(self, step: int, slot: int) -> Draws:
        """One micro-batch of a step, counted over all ranks."""
        first = slot * self.micro_batch_size
        return self.step(step)[first : first + self.micro_batch_size]

    def _drawn(self, step: int) -> Draws:
        epoch, place = divmod(step, self.steps_per_epoch)
        begin = self._counts_at(place * self.batch_size)
        end = self._counts_at((place + 1) * self.batch_size)
        drawn = []
        for source, quota in enumerate(self._quotas):
            first = epoch * quota
            drawn.append(self._of_source(source, first + begin[source], first + end[source]))
        order = slice(None) if len(drawn) == 1 else self._shuffled(step)
        return Draws(
            np.concatenate([draws.ids for draws in drawn])[order],
            np.concatenate([draws.repeats for draws in drawn])[order],
        )

    def _counts_at(self, slots: int) -> list[int]:
        """How many of the first `slots` draws of an epoch come from each source: a rounded share.

        Each source takes its share of the slots that the sources before it leave. So no count falls
        as the slots grow, and at the end of the epoch the counts are the quotas.
        """
        counts, left = [], sum(self._quotas)
        for quota in self._quotas:
            counts.append(slots * quota // left)
            slots -= counts[-1]
            left -= quota
        return counts

    def _of_source(self, source: int, first: int, stop: int) -> Draws:
        """Draws first..stop-1 of a source."""
        size = self._sizes[source]
        repeats, places = np.divmod(np.arange(first, stop, dtype=np.int64), size)
        ids = np.empty_like(places)
        for repeat in np.unique(repeats).tolist():
            permutation = Permutation(size, generator(self._seed, Stream.ORDER, source, repeat))
            now = repeats == repeat
            ids[now] = permutation(places[now])
        return Draws(ids + sum(self._sizes[:source]), repeats)

    def _shuffled(self, step: int) -> NDArray[np.int64]:
        """The order of a step's images, so that each micro-batch draws from all sources."""
        rng = generator(self._seed, Stream.MIXTURE, step)
        return Permutation(self.batch_size, rng)(np.arange(self.batch_size))
