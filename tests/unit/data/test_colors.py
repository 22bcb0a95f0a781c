"""Batched colours are those of Pillow and torchvision for the same parameters.

Tolerances in 8-bit levels, over pictures of noise (every colour occurs) and smooth ones. What
Pillow does in 8 bit (rounding after each of the six box blurs of a Gaussian, hue and saturation of
256 values) is written here in float64, without rounding: ours may be off by its own rounding to
whole levels, Pillow by the roundings it does. What is nearly a tie rounds either way.
"""

import math
import shutil

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.ndimage import convolve1d
from torch._dynamo.exc import TorchDynamoException

from dinoscale.data.augmentation import color_jitter
from dinoscale.data.augmentation.crop_params import HUE, NOT_SOLARIZED, NOTHING, Params
from dinoscale.data.augmentation.reference_crops import reference_crop, turn_hue
from tests.unit.data.conftest import picture
from tests.unit.data.test_plain_crops import CHANGES, JITTER, params

SIZE = 40
HALF = 0.5  # a level, what rounding to whole ones takes
EPS = float(np.finfo(np.float32).eps)


def _pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    flat = np.full((SIZE, SIZE, 3), (255, 0, 130), dtype=np.uint8)
    smooth = [picture(seed, width=SIZE, height=SIZE) for seed in range(3)]
    grays = [picture(9, width=SIZE, height=SIZE).convert("L").convert("RGB")]
    return [*(Image.fromarray(x) for x in (*noise, flat)), *smooth, *grays]


PICTURES = _pictures()


def _tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(x) for x in images])).permute(0, 3, 1, 2).float()


def _levels(images: list[Image.Image]) -> NDArray[np.float64]:
    return np.stack([np.asarray(x, dtype=np.float64) for x in images])


def _difference(ours: torch.Tensor, theirs: list[Image.Image]) -> torch.Tensor:
    assert torch.equal(ours, ours.round())
    return (ours - _tensor(theirs)).abs()


def _without_hue_of_pillow(image: Image.Image, record: Params) -> Image.Image:
    """The plain path, but hue and blur in float64 and then rounded once."""
    order = record["order"].tolist()
    place = order.index(HUE) if HUE in order else len(order)
    before, after, last = record.copy(), record.copy(), record.copy()
    before["order"][place:] = after["order"][: place + 1] = last["order"] = NOTHING
    before["gray"] = last["gray"] = after["flip"] = last["flip"] = False
    before["blur_radius"] = after["blur_radius"] = last["blur_radius"] = 0
    before["solarize_from"] = after["solarize_from"] = NOT_SOLARIZED
    image = reference_crop(image, before, size=SIZE)
    if place < len(order):
        image = _rounded(_exact_hue(image, float(record["factors"][HUE])))
    image = reference_crop(image, after, size=SIZE)
    if record["blur_radius"] > 0:
        image = _rounded(_exact_blur(image, record["blur_radius"]))
    return reference_crop(image, last, size=SIZE)


def _rounded(levels: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8))


def _exact_hue(image: Image.Image, turn: float, *, more: float = 0.0) -> NDArray[np.float64]:
    """Around the circle a channel is high, falls for a sixth, is low for a third, and rises.

    Pillow cuts the hue to 8 bit, half a step in the mean; `more` steps are turned beyond.
    """
    levels = np.asarray(image, dtype=np.float64)
    red, green, blue = np.moveaxis(levels, -1, 0)
    high, low = levels.max(-1), levels.min(-1)
    spread = np.where(high > low, high - low, 1)
    sixths = np.select(
        [high == red, high == green],
        [(green - blue) / spread, 2 + (blue - red) / spread],
        4 + (red - green) / spread,
    )
    sixths += 6 * (int(turn * 255) - 0.5 + more) / 256
    away = [abs((sixths - peak + 3) % 6 - 3) for peak in (0, 2, 4)]
    return low[..., None] + (high - low)[..., None] * np.clip(2 - np.stack(away, -1), 0, 1)


def _exact_blur(image: Image.Image, sigma: float) -> NDArray[np.float64]:
    """Three box blurs along each axis, beyond the edges their pixels again."""
    half = float(color_jitter.box_radius(np.float32([sigma]))[0])
    reach = int(half) + 1
    offsets = np.arange(-reach, reach + 1)
    weights = np.clip(half + 1 - abs(offsets), 0, 1) / (2 * half + 1)
    levels = np.asarray(image, dtype=np.float64)
    for axis in (0, 1) * 3:
        levels = convolve1d(levels, weights, axis=axis, mode="nearest")
    return levels


def _error_of_blur(size: int) -> float:
    """Of a sum of `size` products in float32 along each axis, of levels up to 255."""
    return 2 * size * EPS * 255


def _column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None]


FACTORS = [0.0, 0.4, 0.73, 0.999, 1.0, 1.2, 1.4, 3.0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (color_jitter.adjust_brightness, ImageEnhance.Brightness),
        (color_jitter.adjust_contrast, ImageEnhance.Contrast),
        (color_jitter.adjust_saturation, ImageEnhance.Color),
    ],
)
def test_blends_equal_pillows(ours: color_jitter._Change, theirs: type[ImageEnhance.Color]) -> None:
    factors = _column(FACTORS)
    changed = ours(_tensor(PICTURES).contiguous(), factors)
    blends = [theirs(picture) for picture in PICTURES]
    expected = [blend.enhance(f) for blend, f in zip(blends, FACTORS, strict=True)]
    # Before it is cut to whole levels; wherever float32 cannot miss the level, it is the same.
    start = _tensor([blend.degenerate for blend in blends]).double()
    exact = start + factors.double() * (_tensor(PICTURES) - start)
    rounding = 4 * EPS * 255 * factors.double().clamp(min=1)
    either_way = (exact - exact.round()).abs() <= rounding
    difference = _difference(changed, expected)
    assert difference[~either_way].max() == 0
    assert difference.max() <= 1


@pytest.mark.parametrize("size", [SIZE, 96, 224, 5])  # narrower than the blur, bands, one matrix
@pytest.mark.parametrize("radius", [0.1, 0.6, 1.4, 2.0, 6.5])
def test_blur_equals_pillows(size: int, radius: float) -> None:
    images = [x.resize((size, size), Image.Resampling.NEAREST) for x in PICTURES]
    half = color_jitter.box_radius(np.full(len(images), radius))
    blurred = color_jitter.blur(_tensor(images), _column(half.tolist()))
    expected = _levels([x.filter(ImageFilter.GaussianBlur(radius)) for x in images])
    exact = np.stack([_exact_blur(image, radius) for image in images])
    found = blurred.permute(0, 2, 3, 1).numpy()
    assert abs(found - exact).max() <= HALF + _error_of_blur(size)
    assert abs(expected - exact).max() <= 6 * HALF  # the yardstick is Pillow's blur: six roundings


def test_blur_of_many_radii_at_once_is_that_of_each() -> None:
    images, radii = _tensor(PICTURES), _column(np.linspace(0.0, 2.0, len(PICTURES)).tolist())
    together = color_jitter.blur(images, radii)
    alone = [color_jitter.blur(images[i : i + 1], radii[i : i + 1]) for i in range(len(images))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1)  # a tie


def test_solarize_equals_pillows() -> None:
    thresholds = [0, 1, 64, 127, 128, 200, 255, 256]
    changed = color_jitter.solarize(_tensor(PICTURES), _column([float(t) for t in thresholds]))
    expected = [ImageOps.solarize(x, t) for x, t in zip(PICTURES, thresholds, strict=True)]
    assert _difference(changed, expected).max() == 0


def _finished(images: list[Image.Image], records: Params, *, compiled: bool = True) -> torch.Tensor:
    """Back in levels 0..255, (M, C, H, H)."""
    crops = torch.from_numpy(np.stack([np.asarray(x) for x in images]))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    finished = color_jitter.finish_crops(crops, records, mean=mean, std=std, compiled=compiled)
    back = finished * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    levels = back * 255
    # A dozen roundings of numbers up to 255.
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=12 * EPS * 255)
    return levels.round()


WHOLE = {"box": (0, 0, SIZE, SIZE)}


@pytest.mark.parametrize("turn", [-0.5, -0.3, -0.1, -0.037, -0.003, 0.0, 0.004, 0.1, 0.2, 0.5])
def test_hue_is_that_of_pillow_without_its_steps(turn: float) -> None:
    record = params(**WHOLE, order=(HUE, *[NOTHING] * 3), factors=(1, 1, 1, turn))
    turned = _finished(PICTURES, np.stack([record] * len(PICTURES)))
    expected = [turn_hue(x, turn) for x in PICTURES]
    found, theirs = turned.permute(0, 2, 3, 1).numpy(), _levels(expected)
    exact = np.stack([_exact_hue(image, turn) for image in PICTURES])
    parts = max(1, math.ceil(6 * abs(turn)))  # of at most a sixth of the circle, each is rounded
    assert abs(found - exact).max() <= parts * HALF + 1e-9  # of float64
    # The yardstick is Pillow's hue: cut to a step of 8 bit, and 256 of its 255ths are a turn, so it
    # is off by one and a half, six levels each; its saturation is cut to 8 bit, the result rounded.
    assert abs(theirs - exact).max() <= 1.5 * 6 + 1 + HALF
    for more in (-0.5, 0.5):  # no bias: half a step less or more is farther off
        other = np.stack([_exact_hue(image, turn, more=more) for image in PICTURES])
        assert abs(theirs - exact).mean() < abs(theirs - other).mean()


@pytest.mark.parametrize("change", [{}, *CHANGES])
def test_each_operation_equals_the_reference(change: dict[str, object]) -> None:
    records = np.stack([params(**WHOLE, **change)] * len(PICTURES))
    _require_plain(PICTURES, records)


def _require_plain(images: list[Image.Image], records: Params) -> None:
    """Fail where the crops are not those of the plain path, but for what rounds either way.

    How much that is, factors tell that differ by a few roundings.
    """
    pairs = list(zip(images, records, strict=True))
    expected = [_without_hue_of_pillow(*pair) for pair in pairs]
    difference = _difference(_finished(images, records), expected)
    nudged = []
    for nudge in (1 - 2 * EPS, 1 + 2 * EPS):
        near = records.copy()
        near["factors"][:, :HUE] *= np.float32(nudge)
        nudged.append(_finished(images, near))
    rounding = (nudged[0] - nudged[1]).abs()
    ties = 2 * _error_of_blur(SIZE)  # so many levels lie so near to a half
    assert difference.mean() <= 3 * rounding.mean() + ties


@pytest.mark.parametrize("pass_bytes", [1, 4 * 3 * SIZE * SIZE * 3, 2**30])
def test_order_and_size_of_the_passes_change_nothing(
    monkeypatch: pytest.MonkeyPatch, pass_bytes: int
) -> None:
    """Every crop keeps its own steps, whether it is worked on alone or beside others."""
    rng = np.random.default_rng(1)
    records = np.stack([params(**WHOLE)] * 32)
    records["order"] = [
        rng.permutation(4) if rng.random() < 0.8 else [NOTHING] * 4 for _ in range(32)
    ]
    records["factors"][:, :3] = rng.uniform(0.6, 1.4, (32, 3))
    records["factors"][:, 3] = rng.uniform(-0.1, 0.1, 32)
    for name in ("flip", "gray"):
        records[name] = rng.random(32) < 0.3
    records["blur_radius"] = np.where(rng.random(32) < 0.5, rng.uniform(0.1, 2, 32), 0)
    records["solarize_from"][rng.random(32) < 0.3] = 128
    images = PICTURES * 4
    monkeypatch.setitem(color_jitter._PASS_BYTES, "cpu", pass_bytes)
    _require_plain(images, records)
    finished = _finished(images, records)
    alone = [_finished([x], r[None]) for x, r in zip(images, records, strict=True)]
    apart = (finished - torch.cat(alone)).abs()
    assert apart.max() <= 1
    assert apart.mean() <= 2 * _error_of_blur(SIZE)


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_pictures_of_any_number_of_channels_are_finished(channels: int) -> None:
    """One channel equals Pillow's mode L; more channels share what one would get."""
    plane = np.asarray(picture(3, width=SIZE, height=SIZE).convert("L"))
    crops = torch.from_numpy(np.repeat(plane[None, :, :, None], channels, axis=-1))
    record = params(
        **WHOLE, order=(1, NOTHING, 0, NOTHING), factors=JITTER["factors"], blur_radius=1.1
    )
    mean, std = (0.0,) * channels, (1 / 255,) * channels
    finished = color_jitter.finish_crops(crops, record[None], mean=mean, std=std)
    expected = _levels([_without_hue_of_pillow(Image.fromarray(plane), record)])[0]
    for channel in finished[0]:
        np.testing.assert_allclose(channel.numpy(), expected, atol=1.01)  # a tie


def test_no_crops_are_finished_too() -> None:
    none = torch.empty(0, SIZE, SIZE, 3, dtype=torch.uint8)
    finished = color_jitter.finish_crops(none, params()[None][:0], mean=(0,) * 3, std=(1,) * 3)
    assert finished.shape == (0, 3, SIZE, SIZE)


def test_nothing_of_the_gradient_tape_is_kept() -> None:
    records = np.stack([params(**WHOLE, **JITTER)])
    crops = torch.from_numpy(np.asarray(PICTURES[0])[None].copy())
    assert not color_jitter.finish_crops(crops, records, mean=(0,) * 3, std=(1,) * 3).requires_grad


@pytest.mark.parametrize(
    "change", sorted(color_jitter._POINTWISE, key=lambda change: change.__name__)
)
def test_each_pointwise_step_is_one_graph_for_any_number_of_crops(
    monkeypatch: pytest.MonkeyPatch, change: color_jitter._Change
) -> None:
    """Traced and no further, which takes seconds; the test below goes all the way."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    traced = torch.compile(change, dynamic=True, backend=backend, fullgraph=True)
    monkeypatch.setattr(color_jitter, "_COMPILED_ON", {"cpu"})
    monkeypatch.setattr(color_jitter, "_compiled", lambda _: traced)
    torch._dynamo.reset()
    for count, side in ((5, 8), (1, 8), (2, 12), (7, 8)):
        pixels = torch.randint(0, 256, (count, 3, side, side)).float()
        values = torch.full((count, 1, 1, 1), 0.1)
        plain = change(pixels.clone(), values)
        assert torch.equal(color_jitter._run(change, pixels, values, compiled=True), plain)
    assert len(graphs) == 1


def test_nothing_is_compiled_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    records = np.stack([params(**WHOLE, **JITTER, solarize_from=128)] * len(PICTURES))
    plain = _finished(PICTURES, records)
    monkeypatch.setattr(color_jitter, "_COMPILED_ON", {"cpu"})
    monkeypatch.setattr(color_jitter, "_compiled", lambda _: pytest.fail("compiled"))
    assert torch.equal(_finished(PICTURES, records, compiled=False), plain)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.timeout(600)
def test_compiled_steps_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with the compiler that stands in for the GPU's."""
    records = np.stack([params(**WHOLE, **JITTER, solarize_from=128)] * len(PICTURES))
    plain = _finished(PICTURES, records)
    monkeypatch.setattr(color_jitter, "_COMPILED_ON", {"cpu"})
    assert torch.equal(_finished(PICTURES, records), plain)
    assert color_jitter._POINTWISE


def test_without_a_compiler_the_steps_are_done_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: color_jitter._Change) -> color_jitter._Change:
        raise TorchDynamoException("no compiler")

    records = np.stack([params(**WHOLE, **JITTER, solarize_from=128)] * len(PICTURES))
    plain = _finished(PICTURES, records)
    monkeypatch.setattr(color_jitter, "_COMPILED_ON", {"cpu"})
    monkeypatch.setattr(color_jitter, "_POINTWISE", set(color_jitter._POINTWISE))
    monkeypatch.setattr(color_jitter, "_compiled", fails)
    assert torch.equal(_finished(PICTURES, records), plain)
    assert caplog.text.count("no compiler") == 1
