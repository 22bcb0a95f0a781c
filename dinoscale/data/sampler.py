"""Which image is read when: a function of (seed, step), so that the saved state is one integer.

One epoch is one permutation of all images; the tail that fills no step is dropped. The images of
a step do not depend on the number of processes or on the accumulation, only their split does.
"""

import numpy as np
from numpy.typing import NDArray

from dinoscale.data.seeding import Stream, generator


class StepSampler:
    """The images of every optimizer step, over all ranks.

    Every image comes at most once an epoch. The reference instead lets each process drop its own
    tail, so that which images it drops depends on the world size (Differs: for exact resume).

    Args:
        num_images: images of the source, >= batch_size.
        batch_size: images of one optimizer step over all ranks.
        micro_batch_size: images of one rank in one forward.
        world_size: number of ranks; divides batch_size / micro_batch_size.
        seed: of the run, >= 0.

    Raises:
        ValueError: the numbers do not fit together.
    """

    def __init__(
        self,
        *,
        num_images: int,
        batch_size: int,
        micro_batch_size: int,
        world_size: int,
        seed: int,
    ):
        if min(num_images, batch_size, micro_batch_size, world_size) < 1 or seed < 0:
            raise ValueError(
                "need num_images, batch_size, micro_batch_size, world_size >= 1 and seed >= 0; got "
                f"{num_images}, {batch_size}, {micro_batch_size}, {world_size}, {seed}"
            )
        if batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size} x world_size {world_size}"
            )
        if num_images < batch_size:
            raise ValueError(f"{num_images} images do not fill one batch of {batch_size}")
        self.num_images = num_images
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.world_size = world_size
        self.seed = seed
        self._order: tuple[int, NDArray[np.integer]] | None = None  # of the epoch last asked for

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one epoch."""
        return self.num_images // self.batch_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.batch_size // (self.micro_batch_size * self.world_size)

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to, from 0."""
        return step // self.steps_per_epoch

    def step_ids(self, step: int) -> NDArray[np.int64]:
        """The images of one optimizer step over all ranks.

        Returns:
            int64 (batch_size,), distinct.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.batch_size
        ids = self._epoch_order(epoch)[first : first + self.batch_size]
        return ids.astype(np.int64)

    def _epoch_order(self, epoch: int) -> NDArray[np.integer]:
        """Permutation of all images; four bytes an image, as every rank holds one."""
        if self._order is None or self._order[0] != epoch:
            dtype = np.int32 if self.num_images < 2**31 else np.int64
            order: NDArray[np.integer] = np.arange(self.num_images).astype(dtype)
            generator(self.seed, Stream.ORDER, epoch).shuffle(order)
            self._order = (epoch, order)
        return self._order[1]

    def micro_batch_ids(self, step: int, *, micro_batch: int, rank: int) -> NDArray[np.int64]:
        """The images that one rank takes in one forward of a step.

        Returns:
            int64 (micro_batch_size,); over all ranks and micro-batches they make up `step_ids`.
        """
        if not (0 <= rank < self.world_size and 0 <= micro_batch < self.accumulation_steps):
            raise ValueError(
                f"no micro-batch {micro_batch} of rank {rank}: there are "
                f"{self.accumulation_steps} of {self.world_size} ranks"
            )
        first = (micro_batch * self.world_size + rank) * self.micro_batch_size
        return self.step_ids(step)[first : first + self.micro_batch_size]
