"""Batched colours are those of Pillow and torchvision for the same parameters.

Tolerances in 8-bit levels, over pictures of noise (every colour occurs) and smooth ones. Pillow
works in 8 bit throughout; what differs is rounding: of a product that is nearly a whole number, of
the saturation and hue that Pillow keeps in 8 bit, and Pillow's rounding after each of the six box
blurs of a Gaussian.
"""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch._dynamo.exc import TorchDynamoException

from dinoscale.data import colors
from dinoscale.data.crop_params import HUE, NOTHING, Params
from dinoscale.data.plain_crops import plain_crop, turn_hue
from tests.unit.data.conftest import picture
from tests.unit.data.test_plain_crops import CHANGES, JITTER, params

SIZE = 40


def _pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    flat = np.full((SIZE, SIZE, 3), (255, 0, 130), dtype=np.uint8)
    smooth = [picture(seed, width=SIZE, height=SIZE) for seed in range(3)]
    grays = [picture(9, width=SIZE, height=SIZE).convert("L").convert("RGB")]
    return [*(Image.fromarray(x) for x in (*noise, flat)), *smooth, *grays]


PICTURES = _pictures()


def _tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(x) for x in images])).permute(0, 3, 1, 2).float()


def _difference(ours: torch.Tensor, theirs: list[Image.Image]) -> torch.Tensor:
    assert torch.equal(ours, ours.round())
    return (ours - _tensor(theirs)).abs()


def _column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None]


FACTORS = [0.0, 0.4, 0.73, 0.999, 1.0, 1.2, 1.4, 3.0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (colors.adjust_brightness, ImageEnhance.Brightness),
        (colors.adjust_contrast, ImageEnhance.Contrast),
        (colors.adjust_saturation, ImageEnhance.Color),
    ],
)
def test_blends_equal_pillows(ours: colors._Change, theirs: type[ImageEnhance.Color]) -> None:
    changed = ours(_tensor(PICTURES).contiguous(), _column(FACTORS))
    expected = [theirs(x).enhance(f) for x, f in zip(PICTURES, FACTORS, strict=True)]
    difference = _difference(changed, expected)
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("size", [SIZE, 96, 224, 5])  # narrower than the blur, bands, one matrix
@pytest.mark.parametrize("radius", [0.1, 0.6, 1.4, 2.0, 6.5])
def test_blur_equals_pillows(size: int, radius: float) -> None:
    images = [x.resize((size, size), Image.Resampling.NEAREST) for x in PICTURES]
    half = colors.box_radius(np.full(len(images), radius))
    blurred = colors.blur(_tensor(images), _column(half.tolist()))
    expected = [x.filter(ImageFilter.GaussianBlur(radius)) for x in images]
    difference = _difference(blurred, expected)
    assert difference.max() <= 3
    assert difference.mean() < 0.75


def test_blur_of_many_radii_at_once_is_that_of_each() -> None:
    images, radii = _tensor(PICTURES), _column(np.linspace(0.0, 2.0, len(PICTURES)).tolist())
    together = colors.blur(images, radii)
    alone = [colors.blur(images[i : i + 1], radii[i : i + 1]) for i in range(len(images))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1)


def test_solarize_equals_pillows() -> None:
    thresholds = [0, 1, 64, 127, 128, 200, 255, 256]
    changed = colors.solarize(_tensor(PICTURES), _column([float(t) for t in thresholds]))
    expected = [ImageOps.solarize(x, t) for x, t in zip(PICTURES, thresholds, strict=True)]
    assert _difference(changed, expected).max() == 0


def _finished(images: list[Image.Image], records: Params, *, compiled: bool = True) -> torch.Tensor:
    """Back in levels 0..255, (M, C, H, H)."""
    crops = torch.from_numpy(np.stack([np.asarray(x) for x in images]))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    finished = colors.finish_crops(crops, records, mean=mean, std=std, compiled=compiled)
    back = finished * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    levels = back * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    return levels.round()


WHOLE = {"box": (0, 0, SIZE, SIZE)}


@pytest.mark.parametrize("turn", [-0.5, -0.3, -0.1, -0.037, -0.003, 0.0, 0.004, 0.1, 0.2, 0.5])
def test_hue_is_nearly_pillows(turn: float) -> None:
    record = params(**WHOLE, order=(HUE, *[NOTHING] * 3), factors=(1, 1, 1, turn))
    turned = _finished(PICTURES, np.stack([record] * len(PICTURES)))
    expected = [turn_hue(x, turn) for x in PICTURES]
    difference = _difference(turned, expected)
    assert difference.max() <= 9  # one and a half steps of the 8-bit hue on a pure colour
    assert difference.mean() < (0.5 if abs(turn) <= 0.1 else 0.55)  # parts are rounded each
    assert abs((turned - _tensor(expected)).mean()) < 0.15


@pytest.mark.parametrize("change", [{}, *CHANGES])
def test_each_operation_is_that_of_the_plain_path(change: dict[str, object]) -> None:
    records = np.stack([params(**WHOLE, **change)] * len(PICTURES))
    expected = [plain_crop(x, r, size=SIZE) for x, r in zip(PICTURES, records, strict=True)]
    difference = _difference(_finished(PICTURES, records), expected)
    assert difference.max() <= (10 if "order" in change else 3)
    assert difference.mean() < 0.5


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
    expected = [plain_crop(x, r, size=SIZE) for x, r in zip(images, records, strict=True)]
    monkeypatch.setitem(colors._PASS_BYTES, "cpu", pass_bytes)
    finished = _finished(images, records)
    difference = _difference(finished, expected)
    assert difference.mean() < 0.5
    assert (difference > 9).float().mean() < 0.005  # of the hue, see above
    alone = [_finished([x], r[None]) for x, r in zip(images, records, strict=True)]
    apart = (finished - torch.cat(alone)).abs()
    assert (apart > 1).float().mean() < 0.001  # ties of the blur, which solarize sees
    assert apart.mean() < 0.01


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_pictures_of_any_number_of_channels_are_finished(channels: int) -> None:
    """One channel equals Pillow's mode L; more channels share what one would get."""
    plane = np.asarray(picture(3, width=SIZE, height=SIZE).convert("L"))
    crops = torch.from_numpy(np.repeat(plane[None, :, :, None], channels, axis=-1))
    record = params(
        **WHOLE, order=(1, NOTHING, 0, NOTHING), factors=JITTER["factors"], blur_radius=1.1
    )
    mean, std = (0.0,) * channels, (1 / 255,) * channels
    finished = colors.finish_crops(crops, record[None], mean=mean, std=std)
    expected = np.asarray(plain_crop(Image.fromarray(plane), record, size=SIZE), dtype=np.float32)
    for channel in finished[0]:
        np.testing.assert_allclose(channel.numpy(), expected, atol=2.01)


def test_no_crops_are_finished_too() -> None:
    none = torch.empty(0, SIZE, SIZE, 3, dtype=torch.uint8)
    finished = colors.finish_crops(none, params()[None][:0], mean=(0,) * 3, std=(1,) * 3)
    assert finished.shape == (0, 3, SIZE, SIZE)


def test_nothing_of_the_gradient_tape_is_kept() -> None:
    records = np.stack([params(**WHOLE, **JITTER)])
    crops = torch.from_numpy(np.asarray(PICTURES[0])[None].copy())
    assert not colors.finish_crops(crops, records, mean=(0,) * 3, std=(1,) * 3).requires_grad


@pytest.mark.parametrize("change", sorted(colors._POINTWISE, key=lambda change: change.__name__))
def test_each_pointwise_step_is_one_graph_for_any_number_of_crops(
    monkeypatch: pytest.MonkeyPatch, change: colors._Change
) -> None:
    """Traced and no further, which takes seconds; the test below goes all the way."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    traced = torch.compile(change, dynamic=True, backend=backend, fullgraph=True)
    monkeypatch.setattr(colors, "_COMPILED_ON", {"cpu"})
    monkeypatch.setattr(colors, "_compiled", lambda _: traced)
    torch._dynamo.reset()
    for count, side in ((5, 8), (1, 8), (2, 12), (7, 8)):
        pixels = torch.randint(0, 256, (count, 3, side, side)).float()
        values = torch.full((count, 1, 1, 1), 0.1)
        plain = change(pixels.clone(), values)
        assert torch.equal(colors._run(change, pixels, values, compiled=True), plain)
    assert len(graphs) == 1


def test_nothing_is_compiled_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    records = np.stack([params(**WHOLE, **JITTER, solarize_from=128)] * len(PICTURES))
    plain = _finished(PICTURES, records)
    monkeypatch.setattr(colors, "_COMPILED_ON", {"cpu"})
    monkeypatch.setattr(colors, "_compiled", lambda _: pytest.fail("compiled"))
    assert torch.equal(_finished(PICTURES, records, compiled=False), plain)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.timeout(600)
def test_compiled_steps_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with the compiler that stands in for the GPU's."""
    records = np.stack([params(**WHOLE, **JITTER, solarize_from=128)] * len(PICTURES))
    plain = _finished(PICTURES, records)
    monkeypatch.setattr(colors, "_COMPILED_ON", {"cpu"})
    assert torch.equal(_finished(PICTURES, records), plain)
    assert colors._POINTWISE


def test_without_a_compiler_the_steps_are_done_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: colors._Change) -> colors._Change:
        raise TorchDynamoException("no compiler")

    records = np.stack([params(**WHOLE, **JITTER, solarize_from=128)] * len(PICTURES))
    plain = _finished(PICTURES, records)
    monkeypatch.setattr(colors, "_COMPILED_ON", {"cpu"})
    monkeypatch.setattr(colors, "_POINTWISE", set(colors._POINTWISE))
    monkeypatch.setattr(colors, "_compiled", fails)
    assert torch.equal(_finished(PICTURES, records), plain)
    assert caplog.text.count("no compiler") == 1
