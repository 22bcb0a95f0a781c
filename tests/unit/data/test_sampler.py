import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoscale.data.order.sampler import Draws, StepSampler


def _sampler(
    num_images: int = 50,
    batch_size: int = 8,
    micro: int = 2,
    world: int = 1,
    seed: int = 0,
    quota: int | None = None,
) -> StepSampler:
    sizes = [num_images]
    return _mixture(sizes, [quota or num_images], batch_size, micro, world=world, seed=seed)


def _mixture(
    sizes: Sequence[int],
    quotas: Sequence[int],
    batch_size: int = 8,
    micro: int = 2,
    *,
    world: int = 1,
    seed: int = 0,
) -> StepSampler:
    return StepSampler(
        sizes=sizes,
        quotas=quotas,
        batch_size=batch_size,
        micro_batch_size=micro,
        world_size=world,
        seed=seed,
    )


def _ids(sampler: StepSampler, steps: range) -> list[int]:
    return np.concatenate([sampler.step(step).ids for step in steps]).tolist()


def _pairs(draws: Draws) -> list[tuple[int, int]]:
    return list(zip(draws.ids.tolist(), draws.repeats.tolist(), strict=True))


def test_every_image_comes_at_most_once_an_epoch() -> None:
    sampler = _sampler()
    assert sampler.steps_per_epoch == 6
    for epoch in range(3):
        ids = _ids(sampler, range(epoch * 6, epoch * 6 + 6))
        assert len(set(ids)) == 48
        assert 0 <= min(ids) <= max(ids) < 50


def test_without_a_quota_the_repeat_is_the_epoch() -> None:
    sampler = _sampler()
    for step in range(20):
        assert set(sampler.step(step).repeats.tolist()) == {step // 6}


def test_epochs_and_seeds_differ_in_their_order() -> None:
    first = _sampler().step(0).ids.tolist()
    assert first != _sampler().step(6).ids.tolist()
    assert first != _sampler(seed=1).step(0).ids.tolist()
    assert first != sorted(first)


def test_images_left_out_change_from_epoch_to_epoch() -> None:
    sampler = _sampler()
    left_out = {
        frozenset(set(range(50)) - set(_ids(sampler, range(epoch * 6, epoch * 6 + 6))))
        for epoch in range(4)
    }
    assert len(left_out) > 1


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    data=st.data(),
    accumulation=st.integers(1, 4),
    world=st.integers(1, 4),
    micro=st.integers(1, 4),
    start=st.integers(0, 40),
)
def test_ranks_micro_batches_and_resuming_only_split_the_sequence(
    sizes: list[int], data: st.DataObject, accumulation: int, world: int, micro: int, start: int
) -> None:
    batch = accumulation * world * micro
    quotas = [data.draw(st.integers(batch, batch + 50)) for _ in sizes]
    whole = _mixture(sizes, quotas, batch, batch)
    sequence = [_pairs(whole.step(step)) for step in range(start + 3)]
    for step in range(start, start + 3):  # a new sampler, as after a resume
        resumed = _mixture(sizes, quotas, batch, micro, world=world)
        shares = [
            resumed.micro_batch(step, micro_batch=m, rank=r)
            for m in range(accumulation)
            for r in range(world)
        ]
        assert [pair for share in shares for pair in _pairs(share)] == sequence[step]


@settings(deadline=None, max_examples=50)
@given(
    num_images=st.integers(1, 40),
    steps=st.integers(1, 12),
    batch=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_truncated_and_repeated_epochs_draw_all_images_equally_often(
    num_images: int, steps: int, batch: int, seed: int
) -> None:
    sampler = _mixture([num_images], [steps * batch], batch, 1, seed=seed)
    assert sampler.steps_per_epoch == steps
    counts: Counter[int] = Counter(dict.fromkeys(range(num_images), 0))
    for step in range(4 * steps):
        for image, repeat in _pairs(sampler.step(step)):
            assert counts[image] == repeat  # so often it was drawn before
            counts[image] += 1
            assert max(counts.values()) - min(counts.values()) <= 1


@settings(deadline=None, max_examples=50)
@given(data=st.data(), batch=st.integers(1, 12), steps=st.integers(1, 12))
def test_a_mixture_meets_its_quotas_and_walks_through_each_source(
    data: st.DataObject, batch: int, steps: int
) -> None:
    num_sources = data.draw(st.integers(1, min(4, batch * steps)))
    cuts = data.draw(
        st.lists(
            st.integers(1, batch * steps - 1),
            min_size=num_sources - 1,
            max_size=num_sources - 1,
            unique=True,
        )
        if num_sources > 1
        else st.just([])
    )
    edges = [0, *sorted(cuts), batch * steps]
    quotas = np.diff(edges).tolist()
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=len(quotas), max_size=len(quotas)))
    sampler = _mixture(sizes, quotas, batch, 1)
    starts = np.cumsum([0, *sizes])
    counts = np.zeros(sum(sizes), dtype=int)
    for epoch in range(3):
        taken = np.zeros(len(sizes), dtype=int)
        for step in range(epoch * steps, (epoch + 1) * steps):
            draws = sampler.step(step)
            assert sorted(_pairs(draws)) == sorted(set(_pairs(draws)))  # no draw comes twice
            np.add.at(counts, draws.ids, 1)
            of_step = np.bincount(
                np.searchsorted(starts, draws.ids, side="right") - 1, minlength=len(sizes)
            )
            taken += of_step
            fair = np.array(quotas) / steps
            assert np.abs(of_step - fair).max() < len(sizes)  # in every step, not on average
            for first, stop in itertools.pairwise(starts):
                # No image comes again before all of its source have come.
                assert np.ptp(counts[first:stop]) <= 1
        assert taken.tolist() == quotas


def test_micro_batches_of_a_mixture_hold_images_of_all_sources() -> None:
    sampler = _mixture([1000, 1000], [500, 500], batch_size=100, micro=20)
    for micro_batch in range(5):
        ids = sampler.micro_batch(0, micro_batch=micro_batch, rank=0).ids
        assert 3 <= (ids < 1000).sum() <= 17


def test_sources_of_equal_size_have_other_orders() -> None:
    ids = np.array(_ids(_mixture([50, 50], [50, 50], batch_size=10), range(10)))
    assert ids[ids < 50].tolist() != (ids[ids >= 50] - 50).tolist()


def test_steps_can_be_requested_in_any_order() -> None:
    forward = [_sampler().step(step).ids.tolist() for step in range(12)]
    sampler = _sampler()
    assert [sampler.step(step).ids.tolist() for step in reversed(range(12))] == forward[::-1]


def test_order_is_what_earlier_versions_drew() -> None:
    """A run resumed under another numpy would otherwise read other images unnoticed."""
    ids = _sampler(num_images=10, batch_size=10, micro=10).step(1).ids
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, 7, 5, 1, 3, 8, 4, 2, 6, 9]
    assert _ids(_mixture([6, 4], [6, 4], batch_size=10), range(1, 2)) == [
        0,
        2,
        7,
        3,
        5,
        4,
        8,
        1,
        6,
        9,
    ]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_images": 7}, "7 images do not fill one batch of 8"),
        ({"quota": 7}, "7 images do not fill one batch of 8"),
        ({"micro": 3}, "batch_size 8 is not a multiple of micro_batch_size 3 x world_size 1"),
        ({"world": 0}, "world_size"),
        ({"num_images": 0, "quota": 9}, "sizes"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_inconsistent_numbers_are_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _sampler(**kwargs)


@pytest.mark.parametrize(("micro_batch", "rank"), [(2, 0), (-1, 0), (0, 2), (0, -1)])
def test_micro_batches_that_do_not_exist_are_refused(micro_batch: int, rank: int) -> None:
    with pytest.raises(ValueError, match="no micro-batch"):
        _sampler(world=2).micro_batch(0, micro_batch=micro_batch, rank=rank)
