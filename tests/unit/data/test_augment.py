from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from dinoscale.data.augment import (
    ColorSpec,
    CropParams,
    CropSpec,
    Jitter,
    MultiCrop,
    apply_crop,
    draw_box,
    draw_crop,
    draw_jitter,
    eval_transform,
    jitter_colors,
    resized_crop,
    turn_hue,
)
from dinoscale.models._torchvision import ensure_torchvision
from tests.unit.data.conftest import picture

ensure_torchvision()

from torchvision import transforms  # noqa: E402  # needs the declaration above
from torchvision.transforms import functional as F  # noqa: E402

BICUBIC = transforms.InterpolationMode.BICUBIC
COLOR = ColorSpec(
    flip_prob=0.5,
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    gray_prob=0.2,
    blur_radius=(0.1, 2.0),
    solarize_threshold=128,
)
GLOBAL_2 = CropSpec(size=24, scale=(0.4, 1.0), blur_prob=0.1, solarize_prob=0.2)


class _TorchDraws:
    """A numpy generator that draws from torch's, in the way torchvision does."""

    def uniform(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, size=(1,)).item())

    def permutation(self, count: int) -> list[int]:
        return torch.randperm(count).tolist()


def _torch_draws(seed: int) -> np.random.Generator:
    torch.manual_seed(seed)
    return cast(np.random.Generator, _TorchDraws())


def _equal(ours: Image.Image, theirs: Image.Image) -> None:
    assert (ours.mode, ours.size) == (theirs.mode, theirs.size)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.fixture(autouse=True)
def _keep_torch_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("size", [(40, 30), (500, 333), (7, 7), (1, 90), (300, 2), (1, 1)])
def test_boxes_are_those_of_torchvision(size: tuple[int, int], scale: tuple[float, float]) -> None:
    image = Image.new("RGB", size)
    for seed in range(40):
        rng = _torch_draws(seed)
        box = draw_box(rng, width=size[0], height=size[1], scale=scale)
        torch.manual_seed(seed)
        expected = transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        assert box == expected


@settings(deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    low=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**31),
)
def test_boxes_lie_inside_the_picture(width: int, height: int, low: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    top, left, h, w = draw_box(rng, width=width, height=height, scale=(low, 1.0))
    assert 0 <= top < top + h <= height
    assert 0 <= left < left + w <= width


def test_box_areas_fill_the_scale_evenly() -> None:
    rng = np.random.default_rng(0)
    boxes = [draw_box(rng, width=400, height=400, scale=(0.05, 0.4)) for _ in range(3000)]
    areas = np.array([h * w for _, _, h, w in boxes]) / 400**2
    assert areas.min() > 0.049
    assert areas.max() < 0.401
    assert areas.mean() == pytest.approx(0.225, abs=0.006)
    log_ratios = np.log([w / h for _, _, h, w in boxes])
    assert log_ratios.mean() == pytest.approx(0, abs=0.012)
    assert abs(log_ratios).max() < np.log(4 / 3) + 0.02


def test_colour_strengths_are_those_of_torchvision() -> None:
    theirs = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    for seed in range(40):
        jitter = draw_jitter(_torch_draws(seed), COLOR)
        torch.manual_seed(seed)
        order, *factors = transforms.ColorJitter.get_params(
            theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue
        )
        assert jitter.order == tuple(order.tolist())
        ours = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        assert ours == pytest.approx(factors, abs=1e-6)


def test_strong_jitter_never_makes_a_factor_negative() -> None:
    rng = np.random.default_rng(0)
    strong = replace(COLOR, brightness=2.0)
    factors = [draw_jitter(rng, strong).brightness for _ in range(500)]
    assert 0 <= min(factors) < 0.1
    assert 2.9 < max(factors) <= 3.0


def test_colour_jitter_equals_torchvision() -> None:
    theirs = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    for seed in range(30):
        image = picture(seed)
        ours = jitter_colors(image, draw_jitter(_torch_draws(seed), COLOR))
        torch.manual_seed(seed)
        _equal(ours, theirs(image))


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.003, 0.0, 0.004, 0.07, 0.5])
def test_hue_equals_torchvision(turn: float) -> None:
    for seed in range(5):
        _equal(turn_hue(picture(seed), turn), F.adjust_hue(picture(seed), turn))


@pytest.mark.parametrize("box", [(0, 0, 30, 40), (3, 5, 20, 9), (29, 39, 1, 1), (0, 7, 30, 2)])
@pytest.mark.parametrize("size", [8, 64])
def test_resized_crop_equals_torchvision(box: tuple[int, int, int, int], size: int) -> None:
    theirs = F.resized_crop(picture(0), *box, [size, size], BICUBIC)
    _equal(resized_crop(picture(0), box=box, size=size), theirs)


def _by_torchvision(image: Image.Image, params: CropParams) -> Image.Image:
    """The reference's pipeline with drawn parameters, in its order."""
    image = F.resized_crop(image, *params.box, [params.size, params.size], BICUBIC)
    if params.flip:
        image = F.hflip(image)
    if params.jitter is not None:
        j = params.jitter
        steps = [
            lambda x: F.adjust_brightness(x, j.brightness),
            lambda x: F.adjust_contrast(x, j.contrast),
            lambda x: F.adjust_saturation(x, j.saturation),
            lambda x: F.adjust_hue(x, j.hue),
        ]
        for number in j.order:
            image = steps[number](image)
    if params.gray:
        image = F.to_grayscale(image, num_output_channels=3)
    if params.blur_radius is not None:
        image = image.filter(ImageFilter.GaussianBlur(radius=params.blur_radius))
    if params.solarize_threshold is not None:
        image = F.solarize(image, params.solarize_threshold)
    return image


JITTER = Jitter((2, 0, 3, 1), 1.3, 0.7, 1.2, -0.06)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"flip": True},
        {"jitter": JITTER},
        {"gray": True},
        {"blur_radius": 1.7},
        {"blur_radius": 0.1},
        {"solarize_threshold": 128},
        {"flip": True, "jitter": JITTER, "gray": True, "blur_radius": 0.9},
    ],
)
def test_each_operation_equals_torchvision(change: dict[str, object]) -> None:
    params = replace(CropParams(box=(2, 4, 25, 30), size=24), **change)
    _equal(apply_crop(picture(0), params), _by_torchvision(picture(0), params))


def test_each_operation_changes_the_crop() -> None:
    plain = CropParams(box=(2, 4, 25, 30), size=24)
    changes: list[dict[str, object]] = [
        {"flip": True},
        {"jitter": JITTER},
        {"gray": True},
        {"blur_radius": 1.7},
        {"solarize_threshold": 128},
    ]
    crops = [apply_crop(picture(0), replace(plain, **change)).tobytes() for change in changes]
    assert len({*crops, apply_crop(picture(0), plain).tobytes()}) == 6


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_whole_chain_equals_torchvision(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = picture(seed, width=20 + seed % 50, height=20 + seed % 37)
    crop = replace(GLOBAL_2, blur_prob=0.5, solarize_prob=0.5)
    params = draw_crop(rng, width=image.width, height=image.height, crop=crop, color=COLOR)
    _equal(apply_crop(image, params), _by_torchvision(image, params))


def test_operations_happen_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_crop(rng, width=40, height=30, crop=GLOBAL_2, color=COLOR) for _ in range(4000)]
    rates = {
        "flip": np.mean([p.flip for p in drawn]),
        "jitter": np.mean([p.jitter is not None for p in drawn]),
        "gray": np.mean([p.gray for p in drawn]),
        "blur": np.mean([p.blur_radius is not None for p in drawn]),
        "solarize": np.mean([p.solarize_threshold is not None for p in drawn]),
    }
    expected = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.1, "solarize": 0.2}
    assert rates == pytest.approx(expected, abs=0.025)
    radii = [p.blur_radius for p in drawn if p.blur_radius is not None]
    assert 0.1 <= min(radii) < 0.2
    assert 1.9 < max(radii) <= 2.0


def test_probability_of_one_step_leaves_the_others_alone() -> None:
    def drawn(color: ColorSpec) -> CropParams:
        rng = np.random.default_rng(3)
        return draw_crop(rng, width=40, height=30, crop=GLOBAL_2, color=color)

    never = drawn(replace(COLOR, jitter_prob=0.0))
    always = drawn(replace(COLOR, jitter_prob=1.0))
    assert always.jitter is not None
    assert replace(always, jitter=None) == never


def _small(**changes: object) -> MultiCrop:
    return MultiCrop(**{"global_size": 16, "local_size": 8, "num_local": 3, **changes})


def test_crops_have_their_shapes() -> None:
    global_crops, local_crops = _small()(picture(0), seed=0, epoch=0, sample=0)
    assert (global_crops.shape, local_crops.shape) == ((2, 3, 16, 16), (3, 3, 8, 8))
    assert global_crops.dtype == local_crops.dtype == np.uint8


def test_no_local_crops_are_an_empty_array() -> None:
    _, local_crops = _small(num_local=0)(picture(0), seed=0, epoch=0, sample=0)
    assert local_crops.shape == (0, 3, 8, 8)


def test_crops_depend_on_seed_epoch_and_sample_alone() -> None:
    crops = _small()
    key = {"seed": 1, "epoch": 2, "sample": 3}
    first = crops(picture(0), **key)
    crops(picture(1), seed=9, epoch=9, sample=9)
    again = _small()(picture(0), **key)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    for changed in ("seed", "epoch", "sample"):
        other = crops(picture(0), **{**key, changed: 7})
        assert (other[0] != first[0]).any()
        assert (other[1] != first[1]).any()


def test_crops_of_one_picture_differ() -> None:
    _, local_crops = _small()(picture(0), seed=0, epoch=0, sample=0)
    assert len({crop.tobytes() for crop in local_crops}) == 3


def test_number_of_local_crops_does_not_change_the_others() -> None:
    few = _small(num_local=1)(picture(0), seed=0, epoch=0, sample=0)
    many = _small(num_local=3)(picture(0), seed=0, epoch=0, sample=0)
    np.testing.assert_array_equal(few[0], many[0])
    np.testing.assert_array_equal(few[1][0], many[1][0])


def test_probabilities_belong_to_their_kind_of_crop() -> None:
    """Only the second global crop is solarised and only the first is blurred."""
    white = Image.new("RGB", (40, 30), "white")
    crops = _small(solarize_probs=(0.0, 1.0, 0.0), jitter_prob=0.0)
    global_crops, local_crops = crops(white, seed=0, epoch=0, sample=0)
    assert [int(c.max()) for c in (*global_crops, *local_crops)] == [255, 0, 255, 255, 255]
    sharp = _small(blur_probs=(0.0, 0.0, 0.0))(picture(0), seed=0, epoch=0, sample=0)
    soft = _small(blur_probs=(1.0, 0.0, 0.0), blur_radius=(2.0, 2.0))(
        picture(0), seed=0, epoch=0, sample=0
    )
    assert (sharp[0][0] != soft[0][0]).any()
    np.testing.assert_array_equal(sharp[0][1], soft[0][1])
    np.testing.assert_array_equal(sharp[1], soft[1])


def test_global_crops_show_more_than_local_crops() -> None:
    step = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None], 256, 0)).convert("RGB")
    crops = _small(jitter_prob=0.0, blur_probs=(0.0, 0.0, 0.0), solarize_probs=(0.0, 0.0, 0.0))
    global_crops, local_crops = crops(step, seed=0, epoch=0, sample=0)
    assert min(np.ptp(crop) for crop in global_crops) > 120
    assert max(np.ptp(crop) for crop in local_crops) < 190


@pytest.mark.parametrize("change", [{"hue": 0.6}, {"global_size": 0}, {"num_local": -1}])
def test_impossible_numbers_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="need"):
        _small(**change)


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
    ours = eval_transform(image, resize=resize, crop=crop)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, expected)


def test_very_long_pictures_are_shown_by_their_middle() -> None:
    pixels = np.zeros((2, 3000, 3), dtype=np.uint8)
    pixels[:, 1499:1501] = 255
    shown = eval_transform(Image.fromarray(pixels), resize=256, crop=224)
    assert shown.shape == (3, 224, 224)
    assert shown[:, :, 100:124].min() > 200
