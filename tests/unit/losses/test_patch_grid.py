"""Features on another grid: weighted means, a plane, and what the interpolations share."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses.patch_grid import Interpolation, resized


def _features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_bilinear_to_a_coarser_grid_are_weighted_means_and_a_plane_stays_one() -> None:
    side = torch.arange(4.0, dtype=torch.float64)
    plane = (side[:, None] + 10 * side).flatten()[None, :, None]  # (1, 16, 1)
    coarse = resized(plane, num_patches=4, interpolation="bilinear").view(2, 2)
    # The triangle of antialias covers 4 patches, of which the border cuts off one.
    weights = torch.tensor([3.0, 3, 1]) / 7
    low = float((weights * torch.tensor([0.0, 1, 2])).sum())
    ends = torch.tensor([low, 3 - low], dtype=torch.float64)
    torch.testing.assert_close(coarse, ends[:, None] + 10 * ends, rtol=1e-6, atol=1e-6)
    fine = resized(coarse.view(1, 4, 1), num_patches=16, interpolation="bilinear").view(4, 4)
    steps = torch.tensor([0, 0.25, 0.75, 1], dtype=torch.float64) * (ends[1] - ends[0]) + ends[0]
    torch.testing.assert_close(fine, steps[:, None] + 10 * steps, rtol=1e-6, atol=1e-6)


def test_bicubic_is_without_antialias() -> None:
    features = _features(2, 16, 5)
    maps = features.mT.reshape(2, 5, 4, 4)
    small = F.interpolate(maps, size=(2, 2), mode="bicubic", align_corners=False)
    found = resized(features, num_patches=4, interpolation="bicubic")
    assert torch.equal(found, small.flatten(2).mT)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_an_equal_grid_is_left_alone_and_odd_ones_are_refused(interpolation: Interpolation) -> None:
    features = _features(2, 16, 5)
    assert resized(features, num_patches=16, interpolation=interpolation) is features
    low = resized(features.bfloat16(), num_patches=4, interpolation=interpolation)
    assert low.dtype == torch.float32
    for numbers in ((16, 5), (12, 4)):
        with pytest.raises(ValueError, match="need square grids"):
            resized(features[:, : numbers[0]], num_patches=numbers[1], interpolation=interpolation)
