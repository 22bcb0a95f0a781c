"""The drawn set: a pure function of its spec, balanced, masked, and without a pixel shortcut."""

import numpy as np
import pytest
from PIL import Image

from dinoscale.data.sources.synthetic import KINDS, ShapesSource, parse_synthetic
from dinoscale.errors import DataError


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    return np.asarray(image).astype(np.float32)


def test_spec_gives_every_field() -> None:
    source = parse_synthetic("synthetic:shapes?images=30&size=24&seed=3&split=test")
    assert source == ShapesSource(images=30, size=24, seed=3, split="test")
    assert parse_synthetic("synthetic:shapes") == ShapesSource()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("synthetic:faces", "the only synthetic set is 'synthetic:shapes'"),
        ("shapes?images=3", "the only synthetic set is 'synthetic:shapes'"),
        ("synthetic:shapes?image=3", "unknown key 'image', choose from images, size, seed, split"),
        ("synthetic:shapes?images=many", "images='many' is not a whole number"),
        ("synthetic:shapes?size=", "size='' is not a whole number"),
        ("synthetic:shapes?seed=1&seed=2", "'seed' is given twice"),
        ("synthetic:shapes?split=val", "split='val': choose from train, test"),
        ("synthetic:shapes?images=0", "images=0: need at least 1"),
        ("synthetic:shapes?size=4", "size=4: need at least 8"),
    ],
)
def test_bad_spec_is_named(spec: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_synthetic(spec)
    assert says in str(caught.value)


def test_image_depends_on_seed_split_and_index_only() -> None:
    first, again = ShapesSource(images=40, size=24), ShapesSource(images=999, size=24)
    again.picture(17).pixels()  # what was drawn before changes nothing
    for index in (0, 5, 39):
        assert first.picture(index).pixels().tobytes() == again.picture(index).pixels().tobytes()
        assert first.mask(index).tobytes() == again.mask(index).tobytes()
    others = [ShapesSource(size=24, seed=1), ShapesSource(size=24, split="test")]
    pictures = {source.picture(5).pixels().tobytes() for source in [first, *others]}
    pictures.add(first.picture(13).pixels().tobytes())  # of the same class as 5
    assert len(pictures) == 4


def test_caller_cannot_change_the_set() -> None:
    pixels = ShapesSource(images=8, size=24).picture(3).pixels()
    with pytest.raises(ValueError, match="read-only"):
        pixels[:] = 0


def test_labels_are_balanced_and_named() -> None:
    source = ShapesSource(images=100)
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    assert source.labels.dtype == np.int64
    assert len(source.labels) == len(source) == 100
    assert counts.max() - counts.min() <= 1
    assert source.class_names == list(KINDS)


def test_paths_are_unique() -> None:
    assert ShapesSource().path(12) == "synthetic:shapes/train/000012"
    sources = [ShapesSource(images=9), ShapesSource(images=9, split="test")]
    assert len({source.path(i) for source in sources for i in range(9)}) == 18


@pytest.mark.parametrize("index", [-1, 8])
def test_index_outside_the_set_is_refused(index: int) -> None:
    with pytest.raises(IndexError):
        ShapesSource(images=8).picture(index).pixels()


def test_mask_covers_the_objects() -> None:
    source = ShapesSource(images=64, size=48)
    for index in range(len(source)):
        mask, image = source.mask(index), source.picture(index).pixels()
        assert (mask.mode, mask.size, image.shape) == ("L", (48, 48), (48, 48, 3))
        inside = np.asarray(mask) == 255
        assert set(np.unique(mask)) <= {0, 255}
        assert 0.2 < inside.mean() < 0.99
        gray = _pixels(image).mean(-1)
        distance = abs(gray - gray[~inside].mean())  # the sky is of one lightness, objects not
        assert distance[inside].mean() > 2 * distance[~inside].mean()


def test_neither_colour_nor_small_pixels_tell_the_class() -> None:
    train, test = ShapesSource(images=480), ShapesSource(images=160, split="test")

    def features(source: ShapesSource, side: int) -> np.ndarray:
        images = (Image.fromarray(source.picture(i).pixels()) for i in range(len(source)))
        rows = [_pixels(image.resize((side, side))).ravel() for image in images]
        stacked = np.stack(rows)
        centered = stacked - stacked.mean(1, keepdims=True)
        return centered / (np.linalg.norm(centered, axis=1, keepdims=True) + 1e-6)

    for side in (1, 16):
        similarity = features(test, side) @ features(train, side).T
        nearest = np.argsort(-similarity, axis=1)[:, :20]
        votes = np.stack([np.bincount(train.labels[row], minlength=8) for row in nearest])
        accuracy = (votes.argmax(1) == test.labels).mean()
        assert accuracy < 0.45, side  # chance is 0.125
