"""What of a measurement of steps a machine can do in a given time, before it begins."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dinoscale.config import RunConfig, parse_config, split_batch
from dinoscale.runtime import distributed

# Of the rate of large products, what a step reaches at least; half of it is usual.
_EFFICIENCY = 0.3
_BUILD_S = 5.0  # of one side
_EXTRA_STEPS = {"cpu": 2, "cuda": 4}  # of one side in a turn, which are not timed: to warm up, peak


@dataclass(frozen=True)
class Budget:
    """Seconds for all turns, and what decides how much fits into them.

    Attributes:
        limit_s: for all turns together.
        seconds: of steps of each side in each turn, at least one step.
        turns: how many are wanted.
        image_flops: of a step on one image.
        our_flops_per_s: of the fastest products at hand, which ours takes.
        their_flops_per_s: of products in the run's precision, which the literal reference takes.
        device: its type.
        with_reference: whether the reference takes turns with ours.
    """

    limit_s: float
    seconds: float
    turns: int
    image_flops: float
    our_flops_per_s: float
    their_flops_per_s: float
    device: str
    with_reference: bool

    def turn_s(self, images: int, *, theirs: bool = False) -> float:
        """Seconds of a turn of one side, with `images` a step on this rank."""
        rate = self.their_flops_per_s if theirs else self.our_flops_per_s
        step_s = self.image_flops * images / (_EFFICIENCY * rate)
        return _BUILD_S + _EXTRA_STEPS[self.device] * step_s + max(self.seconds, step_s)

    def fits(self, images: int) -> bool:
        """Whether all turns of ours do, in half of the time where the reference has the other."""
        share = self.limit_s / (2 if self.with_reference else 1)
        return self.turns * self.turn_s(images) <= share

    def fits_once(self, images: int) -> bool:
        """Whether one turn of both does."""
        return self.turn_s(images) + self.turn_s(images, theirs=True) <= self.limit_s

    def expected_s(self, images: int, *, theirs: bool) -> float:
        """Seconds that will pass."""
        turn_s = self.turn_s(images) + (self.turn_s(images, theirs=True) if theirs else 0)
        return min(self.turns * turn_s, max(self.limit_s, turn_s))


def fitted(config: RunConfig, budget: Budget, *, world_size: int) -> tuple[RunConfig, str]:
    """The run with as many images a step as there is time for, and what was changed in words.

    First the micro-batches of a step become one, then that is halved; of a run that fits nothing
    is changed or said. Where one turn of the reference takes too long even so, it gets no time and
    ours has all of it. The learning rate may end at 0, since it peaks lower with fewer images.
    """
    split = split_batch(config.train, world_size=world_size)
    size, passes = split.micro_batch_size, split.accumulation_steps
    if budget.fits(size * passes):
        return config, ""
    while size > 1 and not budget.fits(size):
        size //= 2
    if budget.with_reference and not budget.fits_once(size):
        return fitted(config, replace(budget, with_reference=False), world_size=world_size)
    values = config.model_dump(mode="json")
    values["train"] |= {"batch_size": size * world_size, "micro_batch_size": size}
    values["optim"]["min_lr"] = 0.0
    return parse_config(values), (
        f"{split.micro_batch_size} x {passes} images a step and rank do not fit into"
        f" {budget.limit_s / 60:g} minutes on this machine: measuring steps of {size}"
        " (train.batch_size, train.micro_batch_size; --minutes gives it more time)"
    )


def in_turns(turns: int, *, limit_s: float) -> Iterator[int]:
    """Numbers of turns, from 0, while there is time for one more like the longest.

    The first says how long all will take; all ranks get the same turns.
    """
    begin, longest = time.perf_counter(), 0.0
    for turn in range(turns):
        began = time.perf_counter()
        in_time = began - begin + longest <= limit_s
        if turn and not distributed.broadcast_object(in_time):
            say(f"no time for turn {turn + 1} of {turns} within {limit_s / 60:g} minutes")
            return
        yield turn
        took = time.perf_counter() - began
        longest = max(longest, took)
        if not turn and turns > 1:
            say(f"the first of {turns} turns took {took:.3g} s")


def say(text: str) -> None:
    """One line to stderr, of rank 0."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)
