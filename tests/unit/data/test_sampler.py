import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoscale.data.sampler import StepSampler


def _sampler(
    num_images: int = 50, batch_size: int = 8, micro: int = 2, world: int = 1, seed: int = 0
) -> StepSampler:
    return StepSampler(
        num_images=num_images,
        batch_size=batch_size,
        micro_batch_size=micro,
        world_size=world,
        seed=seed,
    )


def test_every_image_comes_at_most_once_an_epoch() -> None:
    sampler = _sampler()
    assert sampler.steps_per_epoch == 6
    for epoch in range(3):
        ids = np.concatenate([sampler.step_ids(epoch * 6 + i) for i in range(6)])
        assert len(set(ids.tolist())) == 48
        assert 0 <= ids.min() <= ids.max() < 50


def test_epochs_and_seeds_differ_in_their_order() -> None:
    first = _sampler().step_ids(0).tolist()
    assert first != _sampler().step_ids(6).tolist()
    assert first != _sampler(seed=1).step_ids(0).tolist()
    assert first != sorted(first)


def test_images_left_out_change_from_epoch_to_epoch() -> None:
    sampler = _sampler()
    left_out = set()
    for epoch in range(4):
        seen = np.concatenate([sampler.step_ids(epoch * 6 + i) for i in range(6)])
        left_out.add(frozenset(set(range(50)) - set(seen.tolist())))
    assert len(left_out) > 1


@settings(deadline=None)
@given(
    accumulation=st.integers(1, 4),
    world=st.integers(1, 4),
    micro=st.integers(1, 4),
    extra=st.integers(0, 30),
    step=st.integers(0, 40),
)
def test_ranks_and_micro_batches_share_out_the_step(
    accumulation: int, world: int, micro: int, extra: int, step: int
) -> None:
    batch_size = accumulation * world * micro
    sampler = _sampler(batch_size + extra, batch_size, micro, world)
    shares = [
        sampler.micro_batch_ids(step, micro_batch=m, rank=r)
        for m in range(accumulation)
        for r in range(world)
    ]
    whole = _sampler(batch_size + extra, batch_size, batch_size, 1)
    np.testing.assert_array_equal(np.concatenate(shares), whole.step_ids(step))
    assert whole.epoch(step) == step // ((batch_size + extra) // batch_size)


def test_steps_can_be_asked_for_in_any_order() -> None:
    forward = [_sampler().step_ids(step).tolist() for step in range(12)]
    sampler = _sampler()
    assert [sampler.step_ids(step).tolist() for step in reversed(range(12))] == forward[::-1]


def test_order_is_what_earlier_versions_drew() -> None:
    """A run resumed under another numpy would otherwise read other images unnoticed."""
    ids = _sampler(num_images=10, batch_size=10, micro=10).step_ids(1)
    assert ids.dtype == np.int64
    assert ids.tolist() == [2, 7, 0, 4, 1, 6, 8, 9, 3, 5]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_images": 7}, "7 images do not fill one batch of 8"),
        ({"micro": 3}, "batch_size 8 is not a multiple of micro_batch_size 3 x world_size 1"),
        ({"world": 0}, "world_size"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _sampler(**kwargs)


@pytest.mark.parametrize(("micro_batch", "rank"), [(2, 0), (-1, 0), (0, 2), (0, -1)])
def test_micro_batches_that_do_not_exist_are_refused(micro_batch: int, rank: int) -> None:
    with pytest.raises(ValueError, match="no micro-batch"):
        _sampler(world=2).micro_batch_ids(0, micro_batch=micro_batch, rank=rank)
