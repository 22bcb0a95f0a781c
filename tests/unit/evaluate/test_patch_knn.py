"""k-NN of single patches, by features whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinoscale.data.sources.synthetic import KINDS, ShapesSource
from dinoscale.evaluate.dense.patch_knn import PatchKnn, PatchPixels, PatchTokens

_SIZE, _PATCH, _EXTRA = 24, 4, 3  # pixels; tokens before those of the patches
_SET = ShapesSource(images=16, size=_SIZE, seed=3)


def _measurement(k: int = 1, resize: int = _SIZE) -> PatchKnn:
    return PatchKnn(
        train=_SET, test=_SET, k=k, resize=resize, crop=_SIZE,
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), batch_size=5,
    )  # fmt: skip


def _classes() -> np.ndarray:
    """Classes of the patches (16, 6, 6), read off the masks by hand."""
    found = np.zeros((16, 6, 6), dtype=np.int64)
    for index in range(16):
        mask = np.asarray(_SET.mask(index)) > 0
        for row in range(6):
            for column in range(6):
                part = mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                found[index, row, column] = (1 + index % len(KINDS)) * (part.mean() > 0.5)
    return found


class _Tokens(nn.Module):
    """Answers with given features of the patches, image after image."""

    patch_size, embed_dim = _PATCH, 9

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self._rest = features

    def features(self, images: Tensor) -> Tensor:
        now, self._rest = self._rest.split((len(images), len(self._rest) - len(images)))
        return torch.cat((torch.full((len(now), _EXTRA, 9), 7.0), now), dim=1)


def _accuracy(classes: np.ndarray, told: np.ndarray) -> float:
    """Of features that tell `told` without doubt, where the bank tells `classes`."""
    codes = [torch.eye(9)[torch.from_numpy(found).flatten(1)] for found in (classes, told)]
    network = PatchTokens(_Tokens(torch.cat(codes)), crop=_SIZE)
    return _measurement(k=20).measure(network, device=torch.device("cpu"))


def test_features_that_tell_the_classes_are_right_and_others_wrong() -> None:
    classes = _classes()
    assert set(classes.flatten()) == set(range(9))
    assert _accuracy(classes, classes) == 100.0
    told = classes.copy()
    told[3, 2, 1:4] = (classes[3, 2, 1:4] + 1) % 9
    assert _accuracy(classes, told) == pytest.approx(100 * (1 - 3 / classes.size))
    assert _accuracy(classes, classes.swapaxes(1, 2)) < 90  # rows and columns


def test_pixels_are_nearest_to_themselves() -> None:
    pixels = PatchPixels(crop=_SIZE, patch_size=_PATCH)
    assert _measurement().measure(pixels, device=torch.device("cpu")) == 100.0
    other = replace(_measurement(), test=replace(_SET, split="test"))
    assert other.measure(pixels, device=torch.device("cpu")) < 90
