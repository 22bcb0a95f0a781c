"""What is stored of a frozen teacher's outputs, cut and joined for micro-batches of other sizes."""

import pytest
import torch

from dinoscale.config import RunConfig, parse_config
from dinoscale.data.augmentation.masks import Masks
from dinoscale.training.feed import masks_of
from dinoscale.training.targets.stripes import Stored, joined, stored_of

IMAGES, WIDTH, PATCHES, STEP = 12, 5, 16, 7


def _config() -> RunConfig:
    return parse_config(
        {
            "model": {"backbone": "vit_tiny_patch16_224", "patch_size": 8},
            "crops": {"global_size": 32, "local_size": 16},
            "ibot": {"loss_weight": 1.0, "mask_rule": "dinov2", "mask_group": 1},
            "eval": {"crop": 32, "resize": 32},
        }
    )


def _masks(first: int, images: int) -> Masks:
    masks = masks_of(_config(), step=STEP, first_image=first, images=images)
    assert masks is not None
    return masks


def _slot(first: int, images: int, *, features: bool) -> Stored:
    """A slot whose values say which crop and patch they are of."""
    crops = torch.arange(2)[:, None] * IMAGES + torch.arange(first, first + images)  # (2, B)
    ids = torch.arange(first, first + images)
    classes = crops[..., None] + torch.arange(WIDTH) / 10
    every = crops[..., None, None] * 100.0 + torch.arange(PATCHES)[:, None].expand(-1, WIDTH)
    if features:
        return Stored(ids, ids + 50, classes, every)
    rows = _masks(first, images).rows
    counts = torch.bincount(rows // PATCHES, minlength=2 * images)
    patches = every.flatten(0, 2)[rows]
    places = (rows % PATCHES).int()
    return Stored(ids, ids + 50, classes, patches, counts.view(2, -1).int(), places)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize(("stored", "read"), [(3, 3), (2, 6), (6, 2), (4, 6), (6, 4)])
def test_any_micro_batches_are_made_of_the_stored_ones(
    stored: int, read: int, features: bool
) -> None:
    firsts = range(0, IMAGES, stored)
    files = [_slot(first, stored, features=features).named(STEP) for first in firsts]
    for first in range(0, IMAGES, read):
        parts = []
        for slot, file in enumerate(files):
            begin = slot * stored
            low, high = max(first - begin, 0), min(first + read - begin, stored)
            if low < high:
                parts.append(stored_of(file, STEP, patches=True).part(low, high))
        found, wanted = joined(parts), _slot(first, read, features=features)
        for name in ("images", "crops", "classes", "patches", "counts", "places"):
            one, other = getattr(found, name), getattr(wanted, name)
            assert (one is None) == (other is None), name
            assert one is None or torch.equal(one, other), name
        if not features:
            rows = found.rows(PATCHES)
            assert rows is not None
            assert torch.equal(rows, _masks(first, read).rows)


def test_patches_are_not_read_where_they_are_not_learned() -> None:
    found = stored_of(_slot(0, 4, features=False).named(STEP), STEP, patches=False)
    assert found.patches is found.counts is found.places is None
    assert torch.equal(found.part(1, 3).images, torch.tensor([1, 2]))
