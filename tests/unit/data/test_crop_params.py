"""What is drawn for a crop: the published distributions, and nothing depends on anything else."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinoscale.data.augmentation.crop_params import (
    HUE,
    NOT_SOLARIZED,
    NOTHING,
    SATURATION,
    ColorSpec,
    CropSpec,
    Params,
    draw_boxes,
    draw_params,
)
from dinoscale.models._torchvision import ensure_torchvision

ensure_torchvision()

from torchvision import transforms  # noqa: E402  # needs the declaration above

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
COUNT = 20000
# A uniform sample exceeds it once in 10^4 draws: Kolmogorov's distribution at 1e-4 is 2.23.
KS_LIMIT = 2.23


def _drawn(color: ColorSpec = COLOR, *, colored: bool = True, seed: int = 0) -> Params:
    rng, specs = np.random.default_rng(seed), [GLOBAL_2] * COUNT
    return draw_params(rng, width=40, height=30, specs=specs, color=color, colored=colored)


DRAWN = _drawn()


def _ks(values: np.ndarray, low: float, high: float) -> float:
    """Kolmogorov-Smirnov statistic times sqrt(n) against the uniform distribution."""
    ordered = (np.sort(values) - low) / (high - low)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = np.maximum(abs(ordered - steps[:-1]), abs(ordered - steps[1:])).max()
    return float(distance * np.sqrt(len(ordered)))


def _ks_of_two(a: np.ndarray, b: np.ndarray) -> float:
    both = np.concatenate([a, b])
    gap = np.searchsorted(np.sort(a), both, "right") / len(a)
    gap -= np.searchsorted(np.sort(b), both, "right") / len(b)
    return float(abs(gap).max() * np.sqrt(len(a) * len(b) / (len(a) + len(b))))


@pytest.mark.parametrize(
    ("index", "low", "high"), [(0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.8, 1.2), (3, -0.1, 0.1)]
)
def test_factors_are_uniform_as_in_torchvision(index: int, low: float, high: float) -> None:
    theirs = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    bounds = [theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue][index]
    assert bounds == pytest.approx((low, high))
    assert _ks(DRAWN["factors"][:, index].astype(np.float64), low, high) < KS_LIMIT


def test_all_orders_of_the_jitter_are_equally_frequent() -> None:
    orders = DRAWN["order"][DRAWN["order"][:, 0] != NOTHING]
    kinds, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(kinds) == 24
    expected = len(orders) / 24
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 55.3  # 23 degrees of freedom, exceeded once in 5000


def test_steps_happen_as_often_as_asked_and_independently() -> None:
    happens = {
        "flip": DRAWN["flip"],
        "jitter": DRAWN["order"][:, 0] != NOTHING,
        "gray": DRAWN["gray"],
        "blur": DRAWN["blur_radius"] > 0,
        "solarize": DRAWN["solarize_from"] < NOT_SOLARIZED,
    }
    expected = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.1, "solarize": 0.2}
    for name, rate in expected.items():  # four standard errors
        error = np.sqrt(rate * (1 - rate) / COUNT)
        assert happens[name].mean() == pytest.approx(rate, abs=4 * error), name
    correlation = np.corrcoef([happens[name] for name in expected])
    assert abs(correlation - np.eye(5)).max() < 4 / np.sqrt(COUNT)


def test_radius_of_the_blur_is_uniform() -> None:
    radii = DRAWN["blur_radius"][DRAWN["blur_radius"] > 0].astype(np.float64)
    assert _ks(radii, 0.1, 2.0) < KS_LIMIT


def test_strong_jitter_never_makes_a_factor_negative() -> None:
    factors = _drawn(replace(COLOR, brightness=2.0))["factors"][:, 0]
    assert _ks(factors.astype(np.float64), 0.0, 3.0) < KS_LIMIT


def test_pictures_without_colours_keep_brightness_and_contrast_only() -> None:
    drawn = _drawn(colored=False)
    assert not drawn["gray"].any()
    assert not np.isin(drawn["order"], [SATURATION, HUE]).any()
    same = DRAWN["order"] < SATURATION
    np.testing.assert_array_equal(drawn["order"][same], DRAWN["order"][same])


def _boxes(count: int, scale: tuple[float, float], width: int, height: int) -> np.ndarray:
    u = np.random.default_rng(0).random((count, 10, 4))
    return draw_boxes(u, width=width, height=height, scale=np.array([scale] * count))


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("size", [(400, 300), (90, 400), (500, 500)])
def test_boxes_are_distributed_as_in_torchvision(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    count = 3000
    ours = _boxes(count, scale, *size)
    image = Image.new("L", size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        get = transforms.RandomResizedCrop.get_params
        theirs = np.array([get(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)])
    for name, values in {
        "top": (ours[:, 0], theirs[:, 0]),
        "left": (ours[:, 1], theirs[:, 1]),
        "area": (ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]),
        "ratio": (ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]),
    }.items():
        assert _ks_of_two(*values) < KS_LIMIT, name


def test_areas_and_log_ratios_are_uniform_where_every_box_fits() -> None:
    boxes = _boxes(COUNT, (0.05, 0.4), 4000, 4000)
    area = boxes[:, 2] * boxes[:, 3] / 4000**2
    assert _ks(area, 0.05, 0.4) < KS_LIMIT
    log_ratio = np.log(boxes[:, 3] / boxes[:, 2])
    assert _ks(log_ratio, np.log(3 / 4), np.log(4 / 3)) < KS_LIMIT


@settings(deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    low=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**31),
)
def test_boxes_lie_inside_the_picture(width: int, height: int, low: float, seed: int) -> None:
    u = np.random.default_rng(seed).random((5, 10, 4))
    boxes = draw_boxes(u, width=width, height=height, scale=np.array([(low, 1.0)] * 5))
    top, left, h, w = boxes.T
    assert (top >= 0).all()
    assert (h >= 1).all()
    assert (top + h <= height).all()
    assert (left >= 0).all()
    assert (w >= 1).all()
    assert (left + w <= width).all()


@pytest.mark.parametrize("size", [(1, 90), (300, 2), (1000, 10)])
def test_where_no_box_fits_it_is_torchvisions_centred_one(size: tuple[int, int]) -> None:
    tall = SimpleNamespace(scale=(0.9, 1.0))
    (box,) = _boxes(1, tall.scale, *size)
    expected = transforms.RandomResizedCrop.get_params(
        Image.new("L", size), list(tall.scale), [3 / 4, 4 / 3]
    )
    assert tuple(box) == expected


def test_probability_of_one_step_leaves_the_others_alone() -> None:
    never, always = (_drawn(replace(COLOR, jitter_prob=rate)) for rate in (0.0, 1.0))
    assert (never["order"] == NOTHING).all()
    assert (always["order"] != NOTHING).all()
    for name in ("box", "flip", "factors", "gray", "blur_radius", "solarize_from"):
        np.testing.assert_array_equal(never[name], always[name])


def test_number_of_crops_does_not_change_the_others() -> None:
    few, many = (
        draw_params(
            np.random.default_rng(1),
            width=40,
            height=30,
            specs=[GLOBAL_2] * count,
            color=COLOR,
            colored=True,
        )
        for count in (2, 7)
    )
    np.testing.assert_array_equal(few, many[:2])
