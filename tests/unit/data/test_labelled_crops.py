"""Crops to train classifiers on: what they are, and that labels stay with their images."""

import logging

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dinoscale.data.augmentation.labelled_crops import LabelledCrops, labelled_crops
from dinoscale.data.augmentation.multi_crop import cut_crops
from dinoscale.data.decoding.decode import BadSampleError, Picture
from dinoscale.errors import DataError
from tests.unit.data.conftest import picture


class _Plain:
    """Ten pictures of one value each, 20 times the label; some cannot be read."""

    class_names = None

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self._broken = broken
        self.labels: NDArray[np.int64] = np.arange(10)

    def __len__(self) -> int:
        return 10

    def path(self, index: int) -> str:
        return f"{index}.png"

    def picture(self, index: int) -> Picture:
        if index in self._broken:
            raise BadSampleError(self.path(index), "torn")
        return Picture.of(np.full((12, 9, 3), 20 * index, dtype=np.uint8), self.path(index))


def _batches(source: _Plain, *, steps: int = 3, **changes: int) -> list[LabelledCrops]:
    settings = {"size": 4, "batch_size": 5, "seed": 0, "num_workers": 0, **changes}
    return list(labelled_crops(source, steps=steps, interpolation="bicubic", **settings))


@pytest.mark.parametrize(("mode", "pillow"), [("bilinear", 2), ("bicubic", 3)])
def test_a_crop_is_resized_as_pillow_does(mode: str, pillow: int) -> None:
    image = picture(0, width=60, height=40)
    boxes = np.array([[3, 5, 30, 44]], dtype=np.int32)
    (crop,) = cut_crops(Picture.of(np.asarray(image), "x"), boxes, [16], interpolation=mode)  # type: ignore[arg-type]  # one of the two
    cut = image.crop((5, 3, 49, 33)).resize((16, 16), Image.Resampling(pillow))
    assert np.abs(crop.astype(int) - np.asarray(cut).astype(int)).max() <= 1
    other = image.crop((5, 3, 49, 33)).resize((16, 16), Image.Resampling(5 - pillow))
    assert np.abs(crop.astype(int) - np.asarray(other).astype(int)).max() > 5


def test_two_batches_of_half_the_set_hold_every_image_once_with_its_label() -> None:
    batches = _batches(_Plain(), steps=4)
    for first in (0, 2):
        two = batches[first : first + 2]
        assert sorted(np.concatenate([b.labels for b in two]).tolist()) == list(range(10))
    for batch in batches:
        assert batch.crops.shape == (5, 4, 4, 3)
        np.testing.assert_array_equal(batch.crops[:, 0, 0, 0], 20 * batch.labels)


def test_batches_are_full_when_the_set_is_smaller_than_a_batch() -> None:
    (batch,) = _batches(_Plain(), steps=1, batch_size=25)
    assert np.bincount(batch.labels).min() == 2
    assert len(batch.labels) == 25


def test_an_image_is_cropped_anew_each_time_it_is_drawn() -> None:
    (batch,) = _batches(_Plain(), steps=1, batch_size=20)
    for label in range(10):
        first, second = batch.params["box"][batch.labels.numpy() == label]
        assert not np.array_equal(first, second)


def test_workers_change_nothing_and_the_seed_does() -> None:
    here, there = _batches(_Plain()), _batches(_Plain(), num_workers=2)
    for one, other in zip(here, there, strict=True):
        assert one.params.tobytes() == other.params.tobytes()
        np.testing.assert_array_equal(one.crops, other.crops)
        np.testing.assert_array_equal(one.labels, other.labels)
    changed = _batches(_Plain(), seed=1)
    assert changed[0].params.tobytes() != here[0].params.tobytes()


def test_half_of_the_crops_are_mirrored_and_none_is_colored() -> None:
    params = np.concatenate([batch.params for batch in _batches(_Plain(), steps=100)])
    assert 0.4 < params["flip"].mean() < 0.6
    assert (params["order"] == 4).all()
    assert not params["gray"].any()
    assert not params["blur_radius"].any()
    areas = params["box"][:, 2] * params["box"][:, 3] / (12 * 9)
    assert areas.min() < 0.2
    assert areas.max() > 0.8


def test_an_unreadable_image_leaves_its_batch_with_its_label(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        batches = _batches(_Plain(broken=(3, 7)), steps=4)
    assert sorted(np.concatenate([b.labels for b in batches[:2]]).tolist()) == [
        *(0, 1, 2, 4, 5, 6, 8, 9)
    ]
    for batch in batches:
        assert len(batch.crops) == len(batch.params) == len(batch.labels)
        np.testing.assert_array_equal(batch.crops[:, 0, 0, 0], 20 * batch.labels)
    assert caplog.text.count("3.png: torn") == 1


def test_a_batch_without_a_readable_image_is_an_error() -> None:
    with pytest.raises(DataError, match=r"none of the 5 images of a batch.*torn"):
        _batches(_Plain(broken=tuple(range(10))))
