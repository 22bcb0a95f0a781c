import io

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale.data.augmentation.color_jitter import finish_crops
from dinoscale.data.augmentation.crop_params import gram_params
from dinoscale.data.augmentation.multi_crop import (
    CropArrays,
    MultiCrop,
    cut_crops,
    eval_transform,
    to_image,
)
from dinoscale.data.augmentation.reference_crops import resized_crop
from dinoscale.data.decoding.decode import RGB, Picture
from dinoscale.models._torchvision import ensure_torchvision
from tests.unit.data.conftest import picture

ensure_torchvision()

from torchvision import transforms  # noqa: E402  # needs the declaration above

BICUBIC = transforms.InterpolationMode.BICUBIC


def _picture(seed: int, **size: int) -> Picture:
    return Picture.of(np.asarray(picture(seed, **size)), "picture")


def _small(**changes: object) -> MultiCrop:
    return MultiCrop(**{"global_size": 16, "local_size": 8, "num_local": 3, **changes})


def _cut(
    multi_crop: MultiCrop, of: Picture, *, seed: int = 0, epoch: int = 0, sample: int = 0
) -> CropArrays:
    arrays = multi_crop.arrays(count=1)
    multi_crop(of, arrays, 0, seed=seed, epoch=epoch, sample=sample)
    return CropArrays(*(array[:, 0] for array in arrays))


@pytest.mark.parametrize("num_local", [0, 3])
def test_crops_have_their_shapes(num_local: int) -> None:
    crops = _cut(_small(num_local=num_local), _picture(0))
    assert crops.global_crops.shape == (2, 16, 16, 3)
    assert crops.local_crops.shape == (num_local, 8, 8, 3)
    assert crops.params.shape == (2 + num_local,)
    assert crops.global_crops.dtype == crops.local_crops.dtype == np.uint8


@pytest.mark.parametrize("plain", [False, True])
def test_crops_depend_on_seed_epoch_and_sample_alone(plain: bool) -> None:
    crops = _small(plain=plain)
    key = {"seed": 1, "epoch": 2, "sample": 3}
    first = _cut(crops, _picture(0), **key)
    _cut(crops, _picture(1), seed=9, epoch=9, sample=9)
    again = _cut(_small(plain=plain), _picture(0), **key)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    for changed in ("seed", "epoch", "sample"):
        other = _cut(crops, _picture(0), **{**key, changed: 7})
        assert (other.global_crops != first.global_crops).any()
        assert (other.local_crops != first.local_crops).any()


def test_crops_of_one_picture_differ() -> None:
    crops = _cut(_small(), _picture(0))
    assert len({crop.tobytes() for crop in crops.local_crops}) == 3


def test_number_of_local_crops_does_not_change_the_others() -> None:
    few, many = (_cut(_small(num_local=count), _picture(0)) for count in (1, 3))
    np.testing.assert_array_equal(few.global_crops, many.global_crops)
    np.testing.assert_array_equal(few.local_crops[0], many.local_crops[0])


@pytest.mark.parametrize("plain", [False, True])
def test_gram_crops_have_the_boxes_and_flips_of_the_global_crops_and_no_colours(
    *, plain: bool
) -> None:
    flips = set()
    for sample in range(8):
        of = _picture(sample, width=60, height=50)
        alone = _cut(_small(plain=plain), of, sample=sample)
        with_gram = _cut(_small(plain=plain, gram_size=24), of, sample=sample)
        assert with_gram.gram_crops.shape == (2, 24, 24, 3)
        assert not alone.gram_crops.size
        for name in ("global_crops", "local_crops", "params"):  # nothing else is drawn
            np.testing.assert_array_equal(getattr(alone, name), getattr(with_gram, name))
        image = to_image(of.pixels())
        for crop, row in zip(with_gram.gram_crops, with_gram.params[:2], strict=True):
            flips.add(bool(row["flip"]))
            expected = np.asarray(resized_crop(image, box=row["box"], size=24))
            if plain and row["flip"]:  # the other path flips on the device
                expected = expected[:, ::-1]
            assert abs(crop.astype(int) - expected).max() <= 1  # torch's kernel rounds otherwise
    assert flips == {False, True}


def test_gram_crops_may_have_the_colours_of_the_global_crops() -> None:
    crops = _cut(_small(plain=True, gram_size=16, gram_colors=True), _picture(0))
    np.testing.assert_array_equal(crops.gram_crops, crops.global_crops)
    row = crops.params[:2].copy()
    row["blur_radius"] = 1.5
    wide = gram_params(row, magnified=2.0, colors=True)
    np.testing.assert_array_equal(wide["blur_radius"], [3, 3])  # the same blur of the picture


def test_both_paths_draw_the_same_parameters() -> None:
    fast, plain = (_cut(_small(plain=plain), _picture(0)) for plain in (False, True))
    np.testing.assert_array_equal(fast.params, plain.params)


def test_probabilities_belong_to_their_kind_of_crop() -> None:
    """Only the second global crop is solarised and only the first is blurred."""
    drawn = _cut(
        _small(solarize_probs=(0.0, 1.0, 0.0), blur_probs=(1.0, 0.0, 0.0)), _picture(0)
    ).params
    assert (drawn["solarize_from"] == 128).tolist() == [False, True, False, False, False]
    assert (drawn["blur_radius"] > 0).tolist() == [True, False, False, False, False]


def test_global_crops_show_more_than_local_crops() -> None:
    step = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 256, 0).repeat(3, axis=2)
    crops = _cut(_small(), Picture.of(step, "step"))
    assert min(np.ptp(crop) for crop in crops.global_crops) > 120
    assert max(np.ptp(crop) for crop in crops.local_crops) < 190


@pytest.mark.parametrize(
    "change", [{"hue": 0.6}, {"global_size": 0}, {"num_local": -1}, {"plain": True, "channels": 4}]
)
def test_impossible_numbers_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="need"):
        _small(**change)


BOXES = np.array(
    [(0, 0, 300, 400), (3, 5, 200, 90), (29, 39, 1, 1), (0, 7, 300, 2), (9, 9, 50, 60)]
)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("size", [8, 64, 224])
def test_cut_crops_are_bicubic_and_rounded_twice(channels: int, size: int) -> None:
    """As Pillow's: after each axis. Pillow's mode F is exact but for float32.

    Of noise that does not overshoot 0 and 255, where results are cut off.
    """
    once = 0.5  # a level; the second axis takes up to 1.25 of the first's, the weights without sign
    float32 = 100 * np.finfo(np.float32).eps * 255  # a few dozen weights on each axis
    rng = np.random.default_rng(0)
    pixels = rng.integers(64, 192, (300, 400, channels), dtype=np.uint8)
    crops = cut_crops(Picture.of(pixels, "noise"), BOXES, [size] * len(BOXES))
    for (top, left, height, width), crop in zip(BOXES.tolist(), crops, strict=True):
        assert crop.shape == (size, size, channels)
        for channel in range(channels):
            box = pixels[top : top + height, left : left + width, channel].astype(np.float32)
            exact = Image.fromarray(box).resize((size, size), Image.Resampling.BICUBIC)
            error = abs(crop[..., channel] - np.asarray(exact))
            assert error.max() <= 1.25 * once + once + float32
            assert error.mean() <= (2 / 12) ** 0.5  # two uniform roundings, in squares


def _photograph(width: int, height: int) -> bytes:
    """A JPEG file with edges and texture, and noise of a camera."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width] / min(width, height)
    waves = np.sin(40 * rows**2 + 30 * columns) + np.sign(np.sin(25 * columns - 9 * rows))
    colors = np.stack([waves, waves * columns, waves * rows], axis=-1) * 50 + 128
    noisy = colors + rng.normal(0, 4, colors.shape)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@pytest.mark.parametrize(("box", "shrink"), [(800, 8), (400, 4), (200, 2), (190, 1)])
def test_large_files_are_decoded_smaller_where_it_hardly_shows(box: int, shrink: int) -> None:
    """Crops of 32 pixels: off by less than with another filter, that of the means of pixels."""
    opened = RGB.open(_photograph(1201, 903), "photograph")
    asked: list[int] = []

    def decode(by: int) -> np.ndarray:
        asked.append(by)
        return opened.pixels(shrink=by)

    seen = Picture("photograph", width=opened.width, height=opened.height, decode=decode)
    boxes = np.array([(1, 2, 900, 901), (3, 290, box, box)])
    crops = cut_crops(seen, boxes, [32, 32])
    assert asked == [shrink]
    whole = opened.pixels()
    exact = cut_crops(Picture.of(whole, "whole"), boxes, [32, 32])
    for (top, left, height, width), crop, same in zip(boxes.tolist(), crops, exact, strict=True):
        cut = Image.fromarray(whole[top : top + height, left : left + width])
        means = np.asarray(cut.resize((32, 32), Image.Resampling.BOX))
        error, yardstick = (np.square(x.astype(int) - same).mean() for x in (crop, means))
        assert error < yardstick
        assert shrink > 1 or error == 0


def test_fast_and_reference_crops_are_nearly_the_same() -> None:
    """End to end the roundings to 8-bit levels of the two, and few values more than 2 off."""
    crop, blur, hue = 2 * 2, 6 + 1, 2 * 2  # roundings: of each axis, each box; Pillow's also of S
    rounded_once = 1 / 12  # the square of a uniform error of half a level
    differences = []
    for sample in range(20):
        of = _picture(sample, width=300, height=200)
        fast, plain = (
            _cut(
                MultiCrop(global_size=64, local_size=32, num_local=4, plain=plain),
                of,
                sample=sample,
            )
            for plain in (False, True)
        )
        for name, params in (
            ("global_crops", fast.params[:2]),
            ("local_crops", fast.params[2:]),
        ):
            crops = torch.from_numpy(getattr(fast, name))
            finished = finish_crops(crops, params, mean=(0,) * 3, std=(1 / 255,) * 3)
            theirs = torch.from_numpy(getattr(plain, name)).movedim(-1, 1)
            differences.append((finished.round() - theirs).abs().flatten())
    difference = torch.cat(differences)
    assert difference.square().mean() < (crop + blur + hue) * rounded_once
    assert (difference > 2).float().mean() < 0.005


@pytest.mark.parametrize(
    "size", [(40, 30), (30, 41), (33, 100), (32, 32), (31, 33), (7, 9), (1, 9), (90, 20)]
)
@pytest.mark.parametrize(("resize", "crop"), [(32, 28), (32, 32), (20, 27), (33, 20)])
def test_evaluation_equals_torchvision(size: tuple[int, int], resize: int, crop: int) -> None:
    image = picture(0, width=size[0], height=size[1])
    theirs = transforms.Compose(
        [transforms.Resize(resize, interpolation=BICUBIC), transforms.CenterCrop(crop)]
    )
    expected = np.asarray(theirs(image)).transpose(2, 0, 1)
    ours = eval_transform(np.asarray(image), resize=resize, crop=crop)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, expected)


def test_very_long_pictures_are_shown_by_their_middle() -> None:
    pixels = np.zeros((2, 3000, 3), dtype=np.uint8)
    pixels[:, 1499:1501] = 255
    shown = eval_transform(pixels, resize=256, crop=224)
    assert shown.shape == (3, 224, 224)
    assert shown[:, :, 100:124].min() > 200
