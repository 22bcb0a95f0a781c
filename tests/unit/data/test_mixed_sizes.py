"""The sizes of a step's crops: a function of (seed, step) alone, and of nothing else in a run."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from dinoscale.data.augmentation.mixed_sizes import MixedSizes, drawn_size
from dinoscale.data.augmentation.multi_crop import MultiCrop
from dinoscale.data.loader import Batch, train_batches
from tests.unit.data.test_loader import Pictures

WEIGHTS = (0.3, 0.3, 0.3, 0.05, 0.05)  # of DINOv3's high-resolution phase
CROPS = [
    MultiCrop(global_size=side, local_size=side // 2, num_local=2, gram_size=2 * side)
    for side in (8, 12, 16)
]
STEPS = 8


def _batches(
    *,
    micro: int = 4,
    rank: int = 0,
    world: int = 1,
    first: int = 0,
    workers: int = 0,
    gram_counts: Callable[[int], bool] = lambda _step: True,
) -> Iterator[Batch]:
    return train_batches(
        Pictures(10, {}),
        MixedSizes(CROPS, (0.25, 0.5, 0.25)),
        batch_size=4,
        micro_batch_size=micro,
        seed=7,
        rank=rank,
        world_size=world,
        start_step=first,
        stop_step=STEPS,
        num_workers=workers,
        gram_counts=gram_counts,
    )


def _side(batch: Batch) -> int:
    side = batch.global_crops.shape[2]
    assert batch.global_crops.shape[2:4] == (side, side)
    assert batch.local_crops.shape[2:4] == (side // 2, side // 2)
    assert batch.gram_crops.shape[2:4] == (2 * side, 2 * side)
    return side


def test_each_size_is_drawn_as_often_as_its_weight_says() -> None:
    steps = 4000
    drawn = [drawn_size(WEIGHTS, seed=1, step=step) for step in range(steps)]
    for index, weight in enumerate(WEIGHTS):
        # 5 standard deviations of a binomial: one run in a million is outside
        within = 5 * math.sqrt(steps * weight * (1 - weight))
        assert abs(drawn.count(index) - steps * weight) < within
    again = sum(drawn[step] == drawn[step + 1] for step in range(steps - 1))
    expected = steps * sum(weight**2 for weight in WEIGHTS)
    assert abs(again - expected) < 5 * math.sqrt(expected)  # neighbouring steps are independent
    assert [drawn_size(WEIGHTS, seed=2, step=step) for step in range(steps)] != drawn
    assert {drawn_size([1.0], seed=1, step=step) for step in range(9)} == {0}


def test_sizes_follow_the_step_whatever_the_workers_ranks_and_first_step() -> None:
    whole = list(_batches())
    weights = (0.25, 0.5, 0.25)
    wanted = [(8, 12, 16)[drawn_size(weights, seed=7, step=step)] for step in range(STEPS)]
    assert [_side(batch) for batch in whole] == wanted
    assert len(set(wanted)) == 3
    for parts in (_batches(workers=2), itertools.chain(whole[:5], _batches(first=5, workers=1))):
        for batch, other in zip(whole, parts, strict=True):
            assert torch.equal(batch.global_crops, other.global_crops)
            assert torch.equal(batch.gram_crops, other.gram_crops)
            assert torch.equal(batch.sample_ids, other.sample_ids)
    of_ranks = [list(_batches(micro=1, rank=rank, world=2)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        # image m * world + r is micro-batch m of rank r
        images = [of_ranks[i % 2][2 * step + i // 2] for i in range(4)]
        joined = torch.cat([part.global_crops for part in images], dim=1)
        assert torch.equal(joined, batch.global_crops)


def test_boxes_and_colours_are_those_of_one_size() -> None:
    one = train_batches(
        Pictures(10, {}),
        CROPS[1],
        batch_size=4,
        micro_batch_size=4,
        seed=7,
        rank=0,
        world_size=1,
        start_step=0,
        stop_step=STEPS,
        num_workers=0,
    )
    for batch, other in zip(_batches(), one, strict=True):
        assert torch.equal(batch.sample_ids, other.sample_ids)
        np.testing.assert_array_equal(batch.params, other.params)
        if _side(batch) == _side(other):
            assert torch.equal(batch.global_crops, other.global_crops)
            assert torch.equal(batch.local_crops, other.local_crops)


def _some(step: int) -> bool:
    return step % 3 == 1


def test_gram_crops_are_cut_in_steps_that_need_them_and_change_no_other() -> None:
    whole, some = list(_batches()), list(_batches(gram_counts=_some))
    resumed = _batches(first=5, workers=1, gram_counts=_some)
    for parts in (some, _batches(workers=2, gram_counts=_some), [*some[:5], *resumed]):
        for step, (batch, other) in enumerate(zip(whole, parts, strict=True)):
            assert torch.equal(batch.global_crops, other.global_crops)
            assert torch.equal(batch.local_crops, other.local_crops)
            np.testing.assert_array_equal(batch.params, other.params)
            if _some(step):
                assert torch.equal(batch.gram_crops, other.gram_crops)
            else:
                assert not len(other.gram_crops)
    for rank in (0, 1):
        of_rank = _batches(micro=1, rank=rank, world=2, gram_counts=_some)
        assert [len(batch.gram_crops) for batch in of_rank] == [0, 0, 2, 2, 0, 0] * 2 + [0, 0, 2, 2]
