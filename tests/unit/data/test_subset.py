"""Training on only so many different images of a set."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoscale.config import parse_config, resolve
from dinoscale.data.decoding.decode import BadSampleError, Picture
from dinoscale.data.loader import Batch, train_batches
from dinoscale.data.sources.mixture import drawn_sizes, open_sources, source_sizes
from dinoscale.data.sources.source import Source
from dinoscale.data.sources.subset import SubsetSource
from dinoscale.data.sources.synthetic import ShapesSource
from dinoscale.errors import ConfigError
from dinoscale.training.feed import multi_crop_of, open_images
from tests.unit.data.conftest import jpeg

SPEC = "synthetic:shapes?images=40&size=8&seed=3"
CONFIG = parse_config(
    {
        "crops": {"global_size": 16, "local_size": 16, "num_local": 1},
        "data": {"train": SPEC, "subset_size": 10},
        "train": {"batch_size": 4, "micro_batch_size": 2},
    }
)


class _Endless:
    """A set of a given size whose images are only named."""

    labels = None
    class_names = None

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def path(self, index: int) -> str:
        return str(index)

    def picture(self, index: int) -> Picture:
        raise BadSampleError(self.path(index), "not drawn")


def _numbers(size: int, images: int) -> list[int]:
    subset = SubsetSource(_Endless(size), images=images)
    return [int(subset.path(i)) for i in range(len(subset))]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 60), data=st.data())
def test_a_smaller_choice_is_a_subset_of_a_larger_one(size: int, data: st.DataObject) -> None:
    more = data.draw(st.integers(1, size))
    fewer = data.draw(st.integers(1, more))
    larger, smaller = _numbers(size, more), _numbers(size, fewer)
    assert len(set(larger)) == more
    assert smaller == larger[:fewer]
    assert set(larger) <= set(range(size))


def test_the_choice_never_changes() -> None:
    assert _numbers(1000, 8) == [272, 578, 51, 225, 153, 318, 202, 610]


def test_every_class_has_its_share_within_chance() -> None:
    labels = ShapesSource(images=8000).labels
    counts = Counter(labels[_numbers(8000, 800)].tolist())
    assert all(abs(counts[kind] - 100) < 40 for kind in range(8))  # 4 standard deviations


def test_a_billion_images_take_no_memory() -> None:
    subset = SubsetSource(_Endless(10**9), images=10**8)
    assert len({subset.path(i) for i in range(100)}) == 100
    assert len(pickle.dumps(subset)) < 2000


def test_an_image_and_its_path_are_those_of_the_set() -> None:
    whole, subset = open_sources([SPEC]), open_sources([SPEC], subset_size=10)
    numbers = {whole.path(i): i for i in range(40)}
    for index in range(10):
        number = numbers[subset.path(index)]
        np.testing.assert_array_equal(
            subset.picture(index).pixels(), whole.picture(number).pixels()
        )
    for index in (-1, 10):
        with pytest.raises(IndexError, match="of 10"):
            subset.picture(index)


def test_all_images_are_the_set_itself() -> None:
    assert isinstance(open_sources([SPEC], subset_size=40), ShapesSource)


def test_the_set_is_counted_whole_and_in_part() -> None:
    subset = open_images(CONFIG)
    assert (source_sizes(subset), drawn_sizes(subset)) == ([40], [10])


def test_more_images_than_there_are_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"data.subset_size: 41 images are more than the 40"):
        open_sources([SPEC], subset_size=41)


def test_a_stream_cannot_be_taken_in_part() -> None:
    with pytest.raises(ConfigError, match="5 images cannot be chosen from shards that are strea"):
        open_sources(["https://x.invalid/{0..9}.tar"], subset_size=5)


def _epochs(source: Source, *, rank: int = 0, world_size: int = 1, workers: int = 0) -> list[Batch]:
    plan = resolve(CONFIG, world_size=1, num_images=source_sizes(source))
    batches = train_batches(
        source,
        multi_crop_of(CONFIG),
        batch_size=plan.batch_size,
        micro_batch_size=2 // world_size,
        seed=1,
        rank=rank,
        world_size=world_size,
        start_step=0,
        stop_step=2 * plan.steps_per_epoch,
        num_workers=workers,
        quotas=plan.quotas,
    )
    return list(batches)


def test_an_epoch_is_the_chosen_images() -> None:
    ids = [i for batch in _epochs(open_images(CONFIG)) for i in batch.sample_ids.tolist()]
    assert len(ids) == 16  # two epochs of ten in whole batches of four
    assert len(set(ids[:8])) == 8
    assert set(ids) <= set(range(10))


def test_ranks_and_workers_change_nothing() -> None:
    one = _epochs(open_images(CONFIG))
    two = [_epochs(open_images(CONFIG), rank=r, world_size=2, workers=r) for r in range(2)]
    for whole, *parts in zip(one, *two, strict=True):
        assert whole.sample_ids.tolist() == [i for p in parts for i in p.sample_ids.tolist()]
        pixels = np.concatenate([part.global_crops.numpy() for part in parts], axis=1)
        np.testing.assert_array_equal(whole.global_crops.numpy(), pixels)


def test_an_unreadable_image_is_named_by_its_own_file(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    subset = open_sources([str(tmp_path)], subset_size=10)
    broken = subset.path(2)
    Path(broken).write_bytes(b"no image")
    bad = [sample for batch in _epochs(subset) for sample in batch.bad]
    assert bad
    assert {(sample.path, sample.sample_id) for sample in bad} == {(broken, 2)}
    assert all(sample.replaced_by in {0, 1, *range(3, 10)} for sample in bad)
