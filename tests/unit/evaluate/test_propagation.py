"""Labels propagated by patch similarity: by hand, and by a loop over all pairs of patches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoscale.errors import ConfigError
from dinoscale.evaluate.video.propagation import (
    Settings,
    Tracker,
    label_image,
    propagate_labels,
    working_size,
)


def _brute_force(
    target: Tensor, context: Tensor, labels: Tensor, *, radius: int, top: int, temp: float
) -> Tensor:
    """The protocol, one patch after another."""
    rows, columns = target.shape[:2]
    result = torch.zeros(rows, columns, labels.shape[-1], dtype=labels.dtype)
    for r in range(rows):
        for c in range(columns):
            votes = [
                (float(target[r, c] @ context[k, i, j]), labels[k, i, j])
                for k in range(len(context))
                for i in range(rows)
                for j in range(columns)
                if abs(i - r) <= radius and abs(j - c) <= radius
            ]
            votes.sort(key=lambda vote: -vote[0])
            weights = torch.tensor(
                [cosine / temp for cosine, _ in votes[:top]], dtype=labels.dtype
            ).exp()
            chosen = torch.stack([label for _, label in votes[:top]])
            result[r, c] = (weights / weights.sum()) @ chosen
    return result


@pytest.mark.parametrize(("radius", "top"), [(1, 5), (3, 2), (12, 5), (40, 7)])
def test_tiles_equal_a_loop_over_all_pairs(radius: int, top: int) -> None:
    torch.manual_seed(radius)
    target = F.normalize(
        torch.randn(9, 10, 6, dtype=torch.float64), dim=-1
    )  # more than a tile both ways
    context = F.normalize(torch.randn(2, 9, 10, 6, dtype=torch.float64), dim=-1)
    labels = torch.rand(2, 9, 10, 2, dtype=torch.float64)
    settings = {"radius": radius, "top": top, "temp": 0.1}
    found = propagate_labels(target, context, labels, **settings)  # type: ignore[arg-type]  # ints and a float
    expected = _brute_force(target, context, labels, **settings)  # type: ignore[arg-type]  # the same
    torch.testing.assert_close(found, expected)


def _unit(*degrees: float) -> Tensor:
    """Vectors of a plane, (len, 2)."""
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def test_two_by_two_patches_by_hand() -> None:
    """Cosines of the first patch with the four: 1, 0.5, 0, -1; the two best vote."""
    context = _unit(0, 60, 90, 180).view(1, 2, 2, 2)
    target = _unit(0, 60, 90, 180).view(2, 2, 2)
    labels = torch.eye(4).view(1, 2, 2, 4)
    found = propagate_labels(target, context, labels, radius=1, top=2, temp=0.5)
    first = math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(0.5 / 0.5))
    torch.testing.assert_close(found[0, 0], torch.tensor([first, 1 - first, 0, 0]))


def test_the_best_patches_are_chosen_over_all_frames_together() -> None:
    """Frame 0 is alike everywhere, frame 1 nowhere: nothing of frame 1 may vote."""
    target = _unit(0).expand(4, 2).reshape(2, 2, 2)
    context = torch.stack((target, _unit(90).expand(4, 2).reshape(2, 2, 2)))
    labels = torch.stack((torch.zeros(2, 2, 1), torch.ones(2, 2, 1)))
    found = propagate_labels(target, context, labels, radius=2, top=4, temp=0.1)
    assert found.abs().max() == 0  # two from each frame would let frame 1 vote
    found = propagate_labels(target, context, labels, radius=2, top=5, temp=0.1)
    assert found.min() > 0


def test_patches_that_tie_with_the_last_voter_vote_too() -> None:
    target = _unit(0).view(1, 1, 2)
    context = _unit(0, 0, 0).view(3, 1, 1, 2)
    labels = torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1, 1)
    found = propagate_labels(target, context, labels, radius=1, top=1, temp=0.1)
    assert float(found) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("height", "width", "patch", "expected"),
    [
        (480, 854, 16, (480, 832)),
        (854, 480, 8, (832, 480)),
        (1080, 1920, 16, (480, 832)),
        (480, 480, 16, (480, 448)),  # the published code cuts the second side of a square
        (480, 854, 14, (476, 854)),
    ],
)
def test_working_sizes(height: int, width: int, patch: int, expected: tuple[int, int]) -> None:
    assert working_size(height, width, size=480, patch=patch) == expected


def test_frames_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(ConfigError, match="larger size"):
        working_size(480, 854, size=8, patch=16)


def test_every_label_is_scaled_before_the_largest_wins() -> None:
    """The object reaches 0.4 at most, less than the background everywhere, and still wins there."""
    labels = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.6, 0.4], [0.6, 0.4]]])  # (1, 4, 2)
    found = label_image(labels, size=(2, 8), patch=2)
    assert found.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2


def test_a_constant_label_never_wins() -> None:
    labels = torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]])
    assert label_image(labels, size=(1, 2), patch=1).tolist() == [[1, 2]]


class _Colors(nn.Module):
    """Patch tokens are the mean colors of the patches."""

    patch_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def features(self, images: Tensor) -> Tensor:
        patches = F.avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        return torch.cat((torch.zeros_like(patches[:, :1]), patches), dim=1)


def test_a_moving_square_is_tracked() -> None:
    def frame(left: int) -> np.ndarray:
        pixels = np.full((64, 128, 3), (20, 200, 20), dtype=np.uint8)
        pixels[16:32, left : left + 16] = (220, 20, 20)
        return pixels

    mask = (frame(16)[..., 0] == 220).astype(np.uint8)
    tracker = Tracker(
        _Colors(), frame(16), mask,
        mean=(0.5,) * 3, std=(0.5,) * 3, settings=Settings(size=64, context=2, radius=3),
    )  # fmt: skip
    for left in (24, 32, 40, 48):
        found = tracker.track(frame(left))
        truth = frame(left)[..., 0] == 220
        overlap = (truth & (found == 1)).sum() / (truth | (found == 1)).sum()
        assert overlap > 0.7
