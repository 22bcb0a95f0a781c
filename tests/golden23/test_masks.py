"""Masks of global crops against those of the generators of DINOv2 and DINOv3.

Their random numbers are not ours, so distributions are compared: means over groups of images, whose
sampling error follows from the spread over the groups.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoscale.data.augmentation.masks import Rule, draw_masks

Tensors = Callable[[str], dict[str, Tensor]]
Numbers = Callable[[str], dict[str, Any]]

RULES: dict[str, Rule] = {"v2": "dinov2", "v3": "dinov3"}
GROUPS = 2000  # drawn by us
SHAPES = 200  # of which the shapes are looked at
ERRORS = 4.5  # standard errors; 1 in 150,000 means of right masks is further off


@functools.cache
def _drawn(
    rule: Rule,
    grid: int,
    images: int,
    *,
    prob: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> NDArray[np.bool_]:
    """Masks of `GROUPS` groups, (groups, crops, rows, columns)."""
    masks = draw_masks(
        seed=1,
        step=0,
        first_image=0,
        images=GROUPS * images,
        grid=(grid, grid),
        prob=prob,
        ratio=ratio,
        rule=rule,
        group=images,
    ).masks
    of_groups = masks.reshape(2, GROUPS, images, grid, grid).transpose(0, 1)
    crops: NDArray[np.bool_] = of_groups.reshape(GROUPS, 2 * images, grid, grid).numpy()
    return crops


def _sorted_counts(masks: NDArray[np.bool_], masked: int) -> NDArray[np.int64]:
    """Masked patches of the masked crops of each group, ascending, (groups, masked crops)."""
    counts = np.sort(masks.sum(axis=(2, 3)), axis=1)
    assert not counts[:, :-masked].any()
    found: NDArray[np.int64] = counts[:, -masked:]
    return found


@pytest.mark.parametrize("generation", RULES)
def test_counts_of_masked_patches(golden23_json: Numbers, generation: str) -> None:
    recorded = golden23_json("masks")[generation]
    masked = recorded["masked_crops"]
    assert recorded["crops"] == 2 * masked == 2 * recorded["images"]
    drawn = _drawn(RULES[generation], recorded["grid"], recorded["images"])
    counts = _sorted_counts(drawn, masked)
    if generation == "v3":
        for kind in ("min", "mean", "max"):
            assert (counts == recorded[f"count_{kind}"]).all()
        assert (counts.sum(axis=1) == recorded["upperbound"]).all()
        return
    assert (counts.sum(axis=1) <= recorded["upperbound"]).all()
    batches = recorded["batches"]
    spread = np.array(recorded["count_std"])
    error = spread * math.sqrt(1 / batches + 1 / GROUPS)
    assert (np.abs(counts.mean(axis=0) - recorded["count_mean"]) <= ERRORS * error).all()
    # The counts are nearly uniform over a bin: var(std) = (m4 / var - var) / (4 n), m4 = 1.8 var^2.
    error = spread * math.sqrt(0.8 / 4 * (1 / batches + 1 / GROUPS))
    assert (np.abs(counts.std(axis=0) - spread) <= ERRORS * error).all()


@pytest.mark.parametrize("generation", RULES)
def test_shapes_of_masks(
    golden23_tensors: Tensors, golden23_json: Numbers, generation: str
) -> None:
    recorded = golden23_json("masks")[generation]
    tensors = golden23_tensors("masks")
    batches = np.stack(
        [tensors[name].numpy() for name in sorted(tensors) if name.startswith(f"{generation}.")]
    )
    drawn = _drawn(RULES[generation], recorded["grid"], recorded["images"])
    _require_alike(batches, drawn[:SHAPES])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", ["A", "B"])
def test_shapes_of_the_masks_of_recorded_runs(
    golden23_tensors: Tensors, golden23_json: Numbers, case: str, ranks: int
) -> None:
    name = f"dinov2_{case}_ranks{ranks}"
    facts, ibot = golden23_json(name), golden23_json(name)["config"]["ibot"]
    images = facts["images_per_rank"]
    groups = [
        masks.unflatten(1, (ranks, images)).transpose(0, 1).reshape(ranks, 2 * images, -1)
        for masks in golden23_tensors(f"{name}_masks").values()
    ]
    grid = math.isqrt(groups[0].shape[-1])
    batches = torch.cat(groups).unflatten(-1, (grid, grid)).numpy()
    prob, ratio = ibot["mask_sample_probability"], tuple(ibot["mask_ratio_min_max"])
    drawn = _drawn("dinov2", grid, images, prob=prob, ratio=ratio)
    _require_alike(batches, drawn[:SHAPES])
    masked = int(2 * images * prob)
    counts, ours = _sorted_counts(batches, masked), _sorted_counts(drawn, masked)
    error = ours.std(axis=0) * math.sqrt(1 / len(counts) + 1 / len(ours))
    assert (np.abs(counts.mean(axis=0) - ours.mean(axis=0)) <= ERRORS * error).all()


def _require_alike(batches: NDArray[np.bool_], drawn: NDArray[np.bool_]) -> None:
    """Fail if a mean over recorded groups is too far from ours; a group's crops are no sample."""
    recorded, ours = (
        np.array([np.mean([_shapes(m) for m in group if m.any()], axis=0) for group in groups])
        for groups in (batches, drawn)
    )
    error = ours.std(axis=0) * math.sqrt(1 / len(recorded) + 1 / len(ours))
    off = recorded.mean(axis=0) - ours.mean(axis=0)
    assert (np.abs(off) <= ERRORS * error).all(), off / error


def _shapes(mask: NDArray[np.bool_]) -> list[float]:
    """What the masked patches of a crop look like."""
    rows, columns = np.nonzero(mask)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    around = np.pad(mask.astype(int), 1)
    neighbours = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]
    return [
        _components(mask),
        height,
        width,
        len(rows) / (height * width),  # how full the bounding box is
        neighbours[mask].mean(),
        rows.mean(),
        columns.mean(),
        mask[0].mean() + mask[-1].mean(),  # at the edges
        mask[:, 0].mean() + mask[:, -1].mean(),
    ]


def _components(mask: NDArray[np.bool_]) -> int:
    """Connected parts, where patches that share a side are connected."""
    left, count = mask.copy(), 0
    for start in np.argwhere(mask).tolist():
        count += int(left[tuple(start)])
        reached = [start]
        while reached:
            row, column = reached.pop()
            if not (0 <= row < len(left) and 0 <= column < len(left) and left[row, column]):
                continue
            left[row, column] = False
            reached += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return count
