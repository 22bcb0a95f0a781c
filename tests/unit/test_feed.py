"""What reaches the colours from the settings of a run."""

import weakref
from typing import Literal

import pytest
from torch import Tensor

from dinoscale.config import resolve
from dinoscale.data.augmentation import color_jitter
from dinoscale.runtime.launcher_env import read_process
from dinoscale.training.feed import Feed, open_images
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
    while micro_batch := next(prepared, None):
        held += map(weakref.ref, (micro_batch.global_crops, micro_batch.local_crops))
        sizes.append(micro_batch.global_crops.shape[1])
        assert bool(asked) == (setting == "auto")
        del micro_batch
    assert sizes == [2, 2, 2]
