"""Features: preprocessing of pixels, labels of rows, and errors that name bad input."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.data.decoding.decode import BadSampleError, Picture
from dinoscale.data.sources.synthetic import ShapesSource
from dinoscale.errors import DataError, NonFiniteError, RunFailedError
from dinoscale.evaluate.features import extract_features, pixel_features, require_finite
from dinoscale.models.zoo import build_backbone
from dinoscale.planning.bench.tensor_memory import live_bytes, with_peak_bytes
from tests.device_reads import DeviceReads

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)


class Colors:
    """Image i is plain grey of value i; some are unreadable, some have no label."""

    def __init__(self, n: int, *, broken: tuple[int, ...] = (), unlabelled: tuple[int, ...] = ()):
        self.class_names = None
        self.labels: NDArray[np.int64] | None = np.arange(n) % 3
        self.labels[list(unlabelled)] = -1
        self._length, self._broken = n, broken

    def __len__(self) -> int:
        return self._length

    def path(self, index: int) -> str:
        return f"color-{index}"

    def picture(self, index: int) -> Picture:
        if index in self._broken:
            raise BadSampleError(self.path(index), "on purpose")
        return Picture.of(np.full((8, 10, 3), index, np.uint8), self.path(index))


class MeanColor(nn.Module):
    """(N, C, H, W) -> (N, C); counts its training-mode calls."""

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.modes: list[bool] = []
        self.shapes: list[tuple[int, ...]] = []
        self.embed_dim = 3

    def forward(self, crops: list[Tensor]) -> Tensor:
        self.modes.append(self.training)
        self.shapes += [tuple(x.shape) for x in crops]
        return torch.cat([x.mean((2, 3)) for x in crops]) * self.scale


def _extract(backbone: nn.Module, source: Colors, **changes: object) -> tuple[Tensor, Tensor]:
    settings = {"resize": 8, "crop": 6, "batch_size": 4, "device": "cpu", "num_workers": 0}
    return extract_features(backbone, source, mean=MEAN, std=STD, **{**settings, **changes})  # type: ignore[arg-type]  # settings of several types


def test_pixels_are_scaled_and_normalised_per_channel_in_float32() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    found = normalize_images(images, mean=MEAN, std=STD)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, -0.2, 1.0]))


def test_rows_and_labels_come_in_the_order_of_the_source() -> None:
    backbone = MeanColor()
    features, labels = _extract(backbone, Colors(10))
    grey = torch.arange(10.0)[:, None] / 255
    torch.testing.assert_close(features, (grey - torch.tensor(MEAN)) / torch.tensor(STD))
    assert labels.tolist() == [i % 3 for i in range(10)]
    assert labels.dtype == torch.int64
    assert backbone.shapes == [(4, 3, 6, 6), (4, 3, 6, 6), (2, 3, 6, 6)]


@pytest.mark.parametrize("training", [True, False])
def test_the_backbone_is_in_eval_mode_without_gradients_and_then_as_before(training: bool) -> None:
    backbone = MeanColor().train(training)
    features, _ = _extract(backbone, Colors(5))
    assert backbone.modes == [False, False]
    assert backbone.training is training
    assert not features.requires_grad


def test_unreadable_images_are_left_out_with_their_labels(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        features, labels = _extract(MeanColor(), Colors(6, broken=(1, 4)))
    torch.testing.assert_close(features[:, 2] * 255, torch.tensor([0.0, 2, 3, 5]))
    assert labels.tolist() == [0, 2, 0, 2]
    assert "color-4" in caplog.text


def test_a_share_without_readable_images_gives_no_rows_of_the_right_width() -> None:
    features, labels = _extract(MeanColor(), Colors(2, broken=(0, 1)))
    assert features.shape == (0, 3)
    assert labels.shape == (0,)


def test_images_without_label_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="2 of 6 images have no label, the first is color-3"):
        _extract(MeanColor(), Colors(6, unlabelled=(3, 5)))
    unlabelled = Colors(6)
    unlabelled.labels = None
    with pytest.raises(DataError, match="no labels"):
        _extract(MeanColor(), unlabelled)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_features_stop_the_measurement(value: float) -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        require_finite(torch.tensor([[0.0, 1.0], [value, 3.4e38]]))
    with pytest.raises(NonFiniteError, match="not finite"):
        _extract(MeanColor(scale=value), Colors(3))


def test_half_precision_backbones_give_float32_features() -> None:
    features, _ = _extract(MeanColor().bfloat16(), Colors(3))
    assert features.dtype == torch.float32


def test_batch_size_does_not_change_the_features_of_a_vit() -> None:
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    backbone = build_backbone("vit_tiny_patch16_224", img_size=32, **sizes)
    source = ShapesSource(images=7, size=32)
    settings = {"resize": 36, "crop": 32, "mean": MEAN, "std": STD, "device": "cpu"}
    one, three = (
        extract_features(backbone, source, batch_size=n, num_workers=0, **settings)[0]  # type: ignore[arg-type]  # settings of several types
        for n in (1, 3)
    )
    assert one.shape == (7, 48)
    torch.testing.assert_close(one, three)


def test_pixel_features_average_areas_of_the_whole_image() -> None:
    class Halves(Colors):
        def picture(self, index: int) -> Picture:  # noqa: ARG002  # part of a protocol
            pixels = np.zeros((64, 32, 3), np.uint8)
            pixels[:, 16:] = 200
            pixels[:, 0] = 100  # half of the first column of the thumbnail
            return Picture.of(pixels, "halves")

    features, numbers = pixel_features(Halves(2), batch_size=1)
    rows = features.reshape(2, 3, 16, 16) * 255
    assert numbers.tolist() == [0, 1]
    torch.testing.assert_close(rows[1, 0, 5], torch.tensor([50.0] + 7 * [0.0] + 8 * [200.0]))


def test_pixel_features_without_a_readable_image_are_refused() -> None:
    with pytest.raises(DataError, match="none of the 2 images"):
        pixel_features(Colors(2, broken=(0, 1)))


class _Greedy(nn.Module):
    def forward(self, _: list[Tensor]) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB. And so on")


def test_out_of_memory_names_the_setting() -> None:
    settings = {"resize": 8, "crop": 8, "batch_size": 64, "num_workers": 0, "device": "cpu"}
    with pytest.raises(RunFailedError, match=r"64 images at once .* memory\); .*eval\.batch_size"):
        extract_features(_Greedy(), Colors(2), mean=MEAN, std=STD, **settings)  # type: ignore[arg-type]  # a mixture of types


class _Wide(nn.Module):
    """The mean of an image many times, (N, 4096)."""

    def forward(self, crops: list[Tensor]) -> Tensor:
        return crops[0].mean((1, 2, 3))[:, None].expand(-1, 4096).clone()


def test_features_are_in_memory_once() -> None:
    before = live_bytes()
    (features, _), peak = with_peak_bytes(lambda: _extract(_Wide(), Colors(200, broken=(7,))))
    assert features.shape == (199, 4096)
    assert peak - before < 1.5 * features.nbytes  # with batches of four


@pytest.mark.parametrize("registers", [0, 2])
def test_no_batch_waits_for_the_device(registers: int) -> None:
    """Whether all features are finite is asked once, after the last batch."""
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "registers": registers}
    backbone = build_backbone("vit_tiny_patch16_224", img_size=32, **sizes)  # type: ignore[arg-type]  # ints
    how = {"resize": 24, "crop": 24}  # so that positions are resized
    _extract(backbone, Colors(1), **how)  # mean and deviation are now on the device
    with DeviceReads() as reads:
        _extract(backbone, Colors(12), **how)
    on_host = {"map_in_workers", "_batch", "eval_batches", "extract_features"}  # labels, numbers
    assert [name for name in reads.callers if name not in on_host] == ["require_finite"]
