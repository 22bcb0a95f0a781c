"""Masks are a function of (seed, step, image), and masked patches are counted exactly."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dinoscale.data.augmentation.masks import Masks, Rule, draw_masks
from dinoscale.data.seeding import Stream, generator

GRID = (7, 9)
PATCHES = math.prod(GRID)
RULES: tuple[Rule, ...] = ("dinov2", "dinov3")
STEP: dict[str, Any] = {
    "seed": 3,
    "step": 5,
    "first_image": 0,
    "images": 12,
    "grid": GRID,
    "prob": 0.5,
    "ratio": (0.1, 0.5),
    "group": 4,
}


def _by_view(masks: Masks) -> torch.Tensor:
    """Bool (2, B, P)."""
    return masks.masks.unflatten(0, (2, -1))


@pytest.mark.parametrize("rule", RULES)
def test_ranks_and_micro_batches_only_split_the_masks_of_a_step(rule: Rule) -> None:
    whole = _by_view(draw_masks(**STEP, rule=rule))
    for size in (4, 8, 12):
        for first in range(0, 12 - size + 1, 4):
            part = draw_masks(**STEP | {"first_image": first, "images": size}, rule=rule)
            assert torch.equal(_by_view(part), whole[:, first : first + size])


@pytest.mark.parametrize("rule", RULES)
def test_masks_depend_on_seed_and_step_and_differ_between_groups_and_views(rule: Rule) -> None:
    masks = draw_masks(**STEP, rule=rule)
    for one, again in zip(masks, draw_masks(**STEP, rule=rule), strict=True):
        assert torch.equal(one, again)
    for changed in ({"seed": 4}, {"step": 6}):
        assert not torch.equal(masks.masks, draw_masks(**STEP | changed, rule=rule).masks)
    groups = _by_view(masks).unflatten(1, (3, 4))
    assert not torch.equal(groups[:, 0], groups[:, 1])
    assert not torch.equal(groups[0], groups[1])


@pytest.mark.parametrize("rule", RULES)
def test_a_group_shares_out_the_ratios_among_a_share_of_its_crops(rule: Rule) -> None:
    for prob, masked in ((0.5, 4), (0.3, 2), (1.0, 8)):
        masks = draw_masks(**STEP | {"prob": prob}, rule=rule)
        ends = torch.linspace(0.1, 0.5, masked + 1)
        for group in _by_view(masks).unflatten(1, (3, 4)).unbind(1):
            counts = group.sum(-1).flatten().sort().values
            assert not counts[:-masked].any()
            assert (counts[-masked:] <= (PATCHES * ends[1:]).long()).all()
            assert (counts[-masked:] >= (PATCHES * ends[:-1]).long() - 3).all()  # 3 may be missing


def test_as_many_crops_are_chosen_in_each_group_as_the_recipe_says_masked_or_not() -> None:
    sparse = STEP | {"ratio": (0.0, 0.1), "images": 48}  # of 63 patches: often none of a crop
    masks = draw_masks(**sparse, rule="dinov2")
    masked = masks.masks.any(1)
    assert not (masked & ~masks.chosen).any()
    assert (masks.chosen & ~masked).any()
    of_groups = masks.chosen.unflatten(0, (2, 12, 4)).sum((0, 2))
    assert of_groups.tolist() == [4] * 12
    part = draw_masks(**sparse | {"first_image": 8, "images": 4}, rule="dinov2")
    whole = masks.chosen.unflatten(0, (2, -1))
    assert torch.equal(part.chosen.unflatten(0, (2, -1)), whole[:, 8:12])


def _literally(rule: Rule, number: int) -> NDArray[np.bool_]:
    """Masks of group `number` of `STEP`, (crops, P): one rectangle after the other."""
    rng = generator(STEP["seed"], Stream.MASKS, STEP["step"], number)
    crops = np.zeros((8, *GRID), dtype=bool)
    ends = (PATCHES * torch.linspace(0.1, 0.5, 5)).tolist()
    below = rng.random(4) if rule == "dinov2" else np.zeros(4)
    counts = [int(ends[i + 1] - (ends[i + 1] - ends[i]) * below[i]) for i in range(4)]
    wanting = set(range(4))
    while wanting:
        uniforms = rng.random((4, 10, 4))
        for crop in sorted(wanting):
            room = min(counts[crop] - int(crops[crop].sum()), GRID[0] // 2 * GRID[1])
            covers = [_literal_rectangle(*u, room=room) for u in uniforms[crop]]
            added = [int((crops[crop] | cover).sum() - crops[crop].sum()) for cover in covers]
            fitting = [
                cover for cover, more in zip(covers, added, strict=True) if 1 <= more <= room
            ]
            crops[crop] |= fitting[0] if fitting else False
            if not fitting or crops[crop].sum() == counts[crop]:
                wanting.remove(crop)
    for crop in range(4 if rule == "dinov3" else 0):
        missing = counts[crop] - crops[crop].sum()
        if missing:
            free = np.flatnonzero(~crops[crop])
            crops[crop].flat[rng.choice(free, missing, replace=False)] = True
    masks: NDArray[np.bool_] = rng.permutation(crops.reshape(8, PATCHES))
    return masks


def _literal_rectangle(
    area: float, aspect: float, top: float, left: float, *, room: int
) -> NDArray[np.bool_]:
    """A rectangle from four uniforms; nothing if it is as high or as wide as the crop."""
    cover = np.zeros(GRID, dtype=bool)
    patches = 4 + (room - 4) * area
    ratio = math.exp(math.log(0.3) + aspect * 2 * math.log(1 / 0.3))
    height, width = round(math.sqrt(patches * ratio)), round(math.sqrt(patches / ratio))
    if height < GRID[0] and width < GRID[1]:
        row, column = int(top * (GRID[0] - height + 1)), int(left * (GRID[1] - width + 1))
        cover[row : row + height, column : column + width] = True
    return cover


@pytest.mark.parametrize("rule", RULES)
def test_masks_are_those_of_plain_loops(rule: Rule) -> None:
    views = _by_view(draw_masks(**STEP, rule=rule)).unflatten(1, (3, 4))
    for number in range(3):
        assert np.array_equal(views[:, number].flatten(0, 1).numpy(), _literally(rule, number))


def test_dinov3_masks_the_same_number_in_every_micro_batch() -> None:
    expected = [int(PATCHES * edge) for edge in torch.linspace(0.1, 0.5, 5)[1:]]
    for step in range(20):
        masks = draw_masks(**STEP | {"step": step, "images": 4}, rule="dinov3")
        assert masks.masks.sum(-1).sort().values.tolist() == [0] * 4 + expected
        assert len(masks.rows) == len(masks.weights) == sum(expected)


def test_a_crop_can_be_masked_whole() -> None:
    masks = draw_masks(**STEP | {"ratio": (0.5, 1.0), "prob": 1.0}, rule="dinov3")
    assert masks.masks.sum(-1).max() == PATCHES


@pytest.mark.parametrize("rule", RULES)
def test_rows_and_weights_follow_from_the_masks(rule: Rule) -> None:
    masks = draw_masks(**STEP, rule=rule)
    assert masks.masks.shape == (2 * 12, PATCHES)
    assert (masks.masks.dtype, masks.rows.dtype) == (torch.bool, torch.int64)
    assert torch.equal(masks.rows, masks.masks.flatten().nonzero().flatten())
    counts = masks.masks.sum(-1)
    assert torch.equal(masks.weights, 1 / counts[masks.rows // PATCHES].float())
    of_crops = torch.zeros(24).index_add(0, masks.rows // PATCHES, masks.weights)
    torch.testing.assert_close(of_crops, (counts > 0).float())


def test_images_that_are_not_whole_groups_are_refused() -> None:
    for changed in ({"images": 6}, {"first_image": 2}):
        with pytest.raises(ValueError, match="whole groups of 4 images"):
            draw_masks(**STEP | changed, rule="dinov3")
