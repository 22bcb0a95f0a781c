"""The slow reference does to a crop what torchvision does, bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from dinoscale.data.augmentation.crop_params import (
    NOT_SOLARIZED,
    NOTHING,
    PARAMS,
    CropSpec,
    Params,
    draw_params,
)
from dinoscale.data.augmentation.reference_crops import reference_crop, resized_crop, turn_hue
from dinoscale.models._torchvision import ensure_torchvision
from tests.unit.data.conftest import picture
from tests.unit.data.test_crop_params import COLOR

ensure_torchvision()

from torchvision import transforms  # noqa: E402  # needs the declaration above
from torchvision.transforms import functional as F  # noqa: E402

BICUBIC = transforms.InterpolationMode.BICUBIC
JITTER = {"order": (2, 0, 3, 1), "factors": (1.3, 0.7, 1.2, -0.06)}


def params(**change: object) -> Params:
    """A record that changes nothing, but for `change`."""
    record = np.zeros((), dtype=PARAMS)
    record["box"] = (2, 4, 25, 30)
    record["order"] = NOTHING
    record["factors"] = (1, 1, 1, 0)
    record["solarize_from"] = NOT_SOLARIZED
    for name, value in change.items():
        record[name] = value
    return record


def by_torchvision(image: Image.Image, record: Params, *, size: int) -> Image.Image:
    """The reference's pipeline with drawn parameters, in its order."""
    image = F.resized_crop(image, *record["box"].tolist(), [size, size], BICUBIC)
    if record["flip"]:
        image = F.hflip(image)
    brightness, contrast, saturation, hue = record["factors"].tolist()
    steps = [
        lambda x: F.adjust_brightness(x, brightness),
        lambda x: F.adjust_contrast(x, contrast),
        lambda x: F.adjust_saturation(x, saturation),
        lambda x: F.adjust_hue(x, hue),
        lambda x: x,
    ]
    for number in record["order"]:
        image = steps[number](image)
    if record["gray"]:
        image = F.to_grayscale(image, num_output_channels=3)
    if record["blur_radius"] > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=float(record["blur_radius"])))
    if record["solarize_from"] < NOT_SOLARIZED:
        image = F.solarize(image, int(record["solarize_from"]))
    return image


def _equal(ours: Image.Image, theirs: Image.Image) -> None:
    assert (ours.mode, ours.size) == (theirs.mode, theirs.size)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.003, 0.0, 0.004, 0.07, 0.5])
def test_hue_equals_torchvision(turn: float) -> None:
    for seed in range(5):
        _equal(turn_hue(picture(seed), turn), F.adjust_hue(picture(seed), turn))


@pytest.mark.parametrize("box", [(0, 0, 30, 40), (3, 5, 20, 9), (29, 39, 1, 1), (0, 7, 30, 2)])
@pytest.mark.parametrize("size", [8, 64])
def test_resized_crop_equals_torchvision(box: tuple[int, int, int, int], size: int) -> None:
    theirs = F.resized_crop(picture(0), *box, [size, size], BICUBIC)
    _equal(resized_crop(picture(0), box=np.array(box), size=size), theirs)


CHANGES: list[dict[str, object]] = [
    {"flip": True},
    JITTER,
    {"gray": True},
    {"blur_radius": 1.7},
    {"blur_radius": 0.1},
    {"solarize_from": 128},
    {"flip": True, **JITTER, "gray": True, "blur_radius": 0.9},
]


@pytest.mark.parametrize("change", [{}, *CHANGES])
def test_each_operation_equals_torchvision(change: dict[str, object]) -> None:
    record = params(**change)
    _equal(reference_crop(picture(0), record, size=24), by_torchvision(picture(0), record, size=24))


def test_each_operation_changes_the_crop() -> None:
    crops = [
        reference_crop(picture(0), params(**change), size=24)
        for change in [{}, *CHANGES]
        if change != {"blur_radius": 0.1}
    ]
    assert len({crop.tobytes() for crop in crops}) == len(crops) == len(CHANGES)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_whole_chain_equals_torchvision(seed: int) -> None:
    image = picture(seed, width=20 + seed % 50, height=20 + seed % 37)
    spec = CropSpec(size=24, scale=(0.4, 1.0), blur_prob=0.5, solarize_prob=0.5)
    (record,) = draw_params(
        np.random.default_rng(seed),
        width=image.width,
        height=image.height,
        specs=[spec],
        color=COLOR,
        colored=True,
    )
    _equal(reference_crop(image, record, size=24), by_torchvision(image, record, size=24))
