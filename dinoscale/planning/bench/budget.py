"""Fit the measurement of a step into a given time, before it begins."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dinoscale.config import (
    RunConfig,
    least_micro_batch,
    micro_batch_unit,
    parse_config,
    split_batch,
)
from dinoscale.runtime import distributed

# Least share of the rate of large matrix products that a step reaches; half is usual.
_EFFICIENCY = 0.3
_BUILD_S = 5.0  # to build ours or the reference
_EXTRA_STEPS = {"cpu": 2, "cuda": 4}  # untimed, of each in a turn: warm-up, peak memory


@dataclass(frozen=True)
class Budget:
    """Time limit for all turns, and the rates that decide how much fits.

    Attributes:
        limit_s: seconds for all turns together.
        seconds: of steps, for ours and the reference in each turn; at least one step.
        turns: requested number of turns.
        image_flops: FLOPs of a step per image.
        our_flops_per_s: rate of the fastest products on this device, which ours uses.
        their_flops_per_s: rate of products in the run's precision, which the reference uses.
        device: type of the device.
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
        """Seconds of a turn of ours or the reference, with `images` per step on this rank."""
        rate = self.their_flops_per_s if theirs else self.our_flops_per_s
        step_s = self.image_flops * images / (_EFFICIENCY * rate)
        return _BUILD_S + _EXTRA_STEPS[self.device] * step_s + max(self.seconds, step_s)

    def fits(self, images: int) -> bool:
        """Whether all turns of ours fit; with the reference, into half of the time."""
        share = self.limit_s / (2 if self.with_reference else 1)
        return self.turns * self.turn_s(images) <= share

    def fits_once(self, images: int) -> bool:
        """Whether one turn of ours and the reference fits."""
        return self.turn_s(images) + self.turn_s(images, theirs=True) <= self.limit_s

    def expected_s(self, images: int, *, theirs: bool) -> float:
        """Expected seconds of the whole measurement."""
        turn_s = self.turn_s(images) + (self.turn_s(images, theirs=True) if theirs else 0)
        return min(self.turns * turn_s, max(self.limit_s, turn_s))


def largest_size(config: RunConfig) -> RunConfig:
    """The run with the largest of its sizes alone, which is what is measured of a mixture."""
    if not config.crops.mixture:
        return config
    largest = config.of_largest_size
    say(f"measuring the largest sizes of crops.mixture alone: {largest.sizes_text}")
    return largest


def fit_to_time(config: RunConfig, budget: Budget, *, world_size: int) -> tuple[RunConfig, str]:
    """Reduce the images of a step until the measurement fits the budget.

    Gradient accumulation goes first, then the micro-batch is halved until it fits, to whole groups
    of masks and of KoLeo. If one turn of the reference takes too long even then, ours gets all the
    time. `optim.min_lr` becomes 0, since fewer images lower the peak learning rate.

    Returns:
        The configuration, and what was changed, in words; as given and empty if it fits.
    """
    split = split_batch(config, world_size=world_size)
    size, passes = split.micro_batch_size, split.accumulation_steps
    if budget.fits(size * passes):
        return config, ""
    unit = micro_batch_unit(config, world_size=world_size)
    least = least_micro_batch(config, world_size=world_size)
    while size > least and not budget.fits(size):
        size = max(size // 2 // unit * unit, least)
    if budget.with_reference and not budget.fits_once(size):
        return fit_to_time(config, replace(budget, with_reference=False), world_size=world_size)
    values = config.model_dump(mode="json")
    values["train"] |= {"batch_size": size * world_size, "micro_batch_size": size}
    if config.schedules.lr is None:
        values["optim"]["min_lr"] = 0.0
    return parse_config(values), (
        f"{split.micro_batch_size} x {passes} images per step and rank do not fit into"
        f" {budget.limit_s / 60:g} minutes on this machine: measuring steps of {size}"
        " (train.batch_size, train.micro_batch_size; --minutes allows more time)"
    )


def in_turns(turns: int, *, limit_s: float) -> Iterator[int]:
    """Numbers of turns, from 0, while the time suffices for one more like the longest.

    The first turn runs in any case, and its time is printed; all ranks get the same turns.
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
    """Print a line to stderr on rank 0."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)
