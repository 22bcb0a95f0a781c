"""What a step's micro-batches are made of, and when they are made."""

import weakref
from typing import Literal

import pytest
import torch
from torch import Tensor

from dinoscale.config import resolve
from dinoscale.data.augmentation import color_jitter
from dinoscale.engine.frozen.gram import crop_size_of
from dinoscale.engine.micro_batch import MicroBatch
from dinoscale.runtime.launcher_env import read_process
from dinoscale.training.feed import (
    Feed,
    MicroBatches,
    coordinates_of,
    masks_of,
    open_images,
    run_of_step,
)
from tests.distributed.tiny_run import BATCH, tiny_config


@pytest.mark.parametrize("setting", ["auto", False])
def test_engine_compile_reaches_the_colours_and_micro_batches_are_made_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, setting: Literal["auto", False]
) -> None:
    config = tiny_config(
        data={"train": "synthetic:shapes?images=6&size=16", "num_workers": 0},
        train={"epochs": 10, "batch_size": BATCH, "micro_batch_size": 2},
        augment={"flip_prob": 0, "jitter_prob": 0, "gray_prob": 0, "solarize_probs": [1, 1, 1]},
        engine={"compile": setting},
    )
    plan = resolve(config, world_size=1, num_images=6)
    feed = Feed(config, plan, read_process({}), open_images(config), depth=2)
    asked: list[color_jitter._Change] = []

    held = list[weakref.ref[Tensor]]()

    def compiled(change: color_jitter._Change) -> color_jitter._Change:
        assert [crops() for crops in held if crops() is not None] == []  # one at a time
        asked.append(change)
        return change

    monkeypatch.setattr(color_jitter, "_COMPILED_ON", {"cpu"})
    monkeypatch.setattr(color_jitter, "_compiled", compiled)
    prepared = feed.prepare(0, next(feed.steps(0, offset=0)))
    assert asked == []
    sizes = []
    for micro_batch in prepared:
        held += map(weakref.ref, (micro_batch.global_crops, micro_batch.local_crops))
        sizes.append(micro_batch.global_crops.shape[1])
        assert bool(asked) == (setting == "auto")
        del micro_batch
    assert sizes == [2, 2, 2]
    assert [crops() for crops in held if crops() is not None] == []  # nor the last at the end


def test_a_micro_batch_is_kept_until_another_is_asked_for() -> None:
    made = []

    def make(index: int) -> MicroBatch:
        made.append(index)
        return MicroBatch(torch.full((2, 1, 3, 4, 4), float(index)), torch.zeros(0), None)

    batches = MicroBatches(2, make)
    assert len(batches) == 2
    assert batches[0] is batches[0]
    kept = weakref.ref(batches[0].global_crops)
    assert batches[1].global_crops.mean() == 1
    assert kept() is None
    assert batches[0].global_crops.mean() == 0
    assert made == [0, 1, 0]
    batches.release()
    assert len(list(batches)) == 2
    assert made == [0, 1, 0, 0, 1]
    with pytest.raises(IndexError):
        batches[2]


def test_a_micro_batch_is_the_same_whenever_it_is_made() -> None:
    config = tiny_config(
        model={"drop_path_rate": 0.5, "num_heads": 1, "rope": {"shift": 0.1, "rescale": 2.0}},
        crops={"global_size": 32},
        data={"train": "synthetic:shapes?images=8&size=32", "num_workers": 0},
        train={"epochs": 10, "batch_size": 8, "micro_batch_size": 4},
        ibot={"loss_weight": 1.0, "mask_group": 2},
    )
    plan = resolve(config, world_size=1, num_images=8)
    feed = Feed(config, plan, read_process({}), open_images(config), depth=2)
    prepared = feed.prepare(7, next(feed.steps(0, offset=0)))
    first, second, again = prepared[0], prepared[1], prepared[0]
    assert again is not first
    assert first.keep is not None
    assert again.keep is not None
    assert first.masks is not None
    assert again.masks is not None
    for one, other in (
        (first.global_crops, again.global_crops),
        (first.local_crops, again.local_crops),
        (first.keep, again.keep),
        *zip(first.masks, again.masks, strict=True),
    ):
        assert torch.equal(one, other)
    for batch in (second, again):  # the same changes for all images of a step
        assert batch.coordinates is not None
        assert torch.equal(batch.coordinates, coordinates_of(config, step=7, depth=2))
    assert batch.coordinates.shape == (2, 2, 5)
    assert batch.coordinates[..., 2:4].eq(1).all()  # no jitter
    assert batch.coordinates[..., 4].unique().numel() == 4
    whole = masks_of(config, step=7, first_image=0, images=8)
    assert whole is not None
    assert second.masks is not None
    assert whole.masks.shape == (16, 16)
    for part, images in ((first.masks, slice(0, 4)), (second.masks, slice(4, 8))):
        assert torch.equal(
            part.masks.unflatten(0, (2, 4)), whole.masks.unflatten(0, (2, 8))[:, images]
        )


def test_coordinates_change_only_where_they_are_asked_to() -> None:
    for rope in (None, {}, {"base": 10.0}):
        assert (
            coordinates_of(tiny_config(model={"num_heads": 1, "rope": rope}), step=0, depth=2)
            is None
        )


@pytest.mark.parametrize("colors", [False, True])
def test_gram_crops_are_flipped_and_their_colours_change_only_if_wanted(*, colors: bool) -> None:
    config = tiny_config(
        data={"train": "synthetic:shapes?images=8&size=32", "num_workers": 0},
        train={"epochs": 10, "batch_size": 8, "micro_batch_size": 8},
        augment={"jitter_prob": 1.0, "solarize_probs": [1, 1, 0]},
        gram={"loss_weight": 1.0, "refresh_every_steps": 1, "crop_colors": colors},
    )
    feed = Feed(
        config,
        resolve(config, world_size=1, num_images=8),
        read_process({}),
        open_images(config),
        depth=2,
    )
    batches = next(feed.steps(0, offset=0))
    (made,), (batch,) = list(feed.prepare(0, batches)), batches
    assert made.gram_crops is not None
    assert torch.equal(made.gram_crops, made.global_crops) == colors
    if colors:
        return
    flips = torch.from_numpy(batch.params["flip"][:2])[..., None, None, None]
    assert flips.any()
    assert not flips.all()
    images = batch.global_crops.movedim(-1, 2) / 255  # of the same size: cut alike
    images = torch.where(flips, images.flip(-1), images)
    mean, std = (
        torch.tensor(numbers)[:, None, None] for numbers in (config.data.mean, config.data.std)
    )
    torch.testing.assert_close(made.gram_crops, (images - mean) / std, rtol=1e-4, atol=1e-5)


def test_masks_and_gram_crops_of_a_step_have_its_sizes() -> None:
    mixture = [
        {"weight": 0.5, "global_size": 32, "local_size": 8, "gram_crop_size": 64},
        {"weight": 0.5, "global_size": 48, "local_size": 16},
    ]
    config = tiny_config(
        crops={"global_size": 48, "local_size": 16, "mixture": mixture},
        data={"train": "synthetic:shapes?images=8&size=32", "num_workers": 0},
        train={"epochs": 10, "batch_size": 8, "micro_batch_size": 4},
        ibot={"loss_weight": 1.0, "mask_group": 2, "mask_rule": "dinov3"},
        augment={"jitter_prob": 0.0, "solarize_probs": [0, 0, 0], "blur_probs": [1, 1, 1]},
        gram={"loss_weight": 1.0, "refresh_every_steps": 1, "crop_colors": True},
    )
    plan = resolve(config, world_size=1, num_images=8)
    feed = Feed(config, plan, read_process({}), open_images(config), depth=2)
    masked: dict[int, set[int]] = {32: set(), 48: set()}
    for step, batches in zip(range(8), feed.steps(0, offset=0), strict=False):
        run = run_of_step(config, step)
        for number, batch in enumerate(feed.prepare(step, batches)):
            size = run.crops.global_size
            assert batch.global_crops.shape[-1] == size
            assert batch.local_crops.shape[-1] == run.crops.local_size
            assert batch.gram_crops is not None
            assert batch.gram_crops.shape[-1] == crop_size_of(run)
            images = {"first_image": 4 * number, "images": 4}
            wanted = masks_of(run, step=step, **images)
            assert wanted is not None
            assert batch.masks is not None
            assert torch.equal(batch.masks.masks, wanted.masks)
            masked[size].add(len(batch.masks.rows))
            if crop_size_of(run) == size:  # blurred as wide as the global crops
                assert torch.equal(batch.gram_crops, batch.global_crops)
    assert [len(counts) for counts in masked.values()] == [1, 1]  # static shapes of each size


def test_gram_crops_are_left_out_in_steps_whose_loss_has_no_weight() -> None:
    config = tiny_config(
        data={"train": "synthetic:shapes?images=8&size=32", "num_workers": 0},
        train={"epochs": 6, "batch_size": 8, "micro_batch_size": 4},
        gram={"loss_weight": 1.0, "refresh_every_steps": 1},
    )
    plan = resolve(config, world_size=1, num_images=8)
    feed = Feed(config, plan, read_process({}), open_images(config), depth=2)
    steps = feed.steps(2, offset=3, gram_counts=lambda step: step == 4)  # a step of the schedules
    for step, batches in zip(range(2, 6), steps, strict=True):
        for batch in feed.prepare(step, batches):
            assert (batch.gram_crops is not None) == (step == 4)


def test_nothing_is_masked_without_a_patch_loss() -> None:
    assert masks_of(tiny_config(), step=0, first_image=0, images=8) is None
