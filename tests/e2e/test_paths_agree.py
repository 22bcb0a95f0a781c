"""Batched colours on the device train like Pillow's in the workers, the slow reference."""

import json
from pathlib import Path

import numpy as np
import pytest

from dinoscale.data.augmentation.multi_crop import MultiCrop
from dinoscale.data.loader import train_batches
from dinoscale.data.sources.source import open_source
from tests.e2e.hostile import dinoscale, settings

STEPS, BATCH, IMAGES = 100, 16, 160
SOURCE = f"synthetic:shapes?images={IMAGES}&size=32"


def _losses(run_dir: Path, *, colors: str) -> np.ndarray:
    run = settings(
        data__train=SOURCE,
        data__color_ops_on=colors,
        run_dir=run_dir,
        train__batch_size=BATCH,
        train__micro_batch_size=BATCH,
        train__epochs=STEPS * BATCH // IMAGES,
        train__stop_after_steps="null",
        log__every_steps=1,
        checkpoint__every_epochs=1000,
        eval__rank_images=0,
        crops__global_size=32,
        crops__local_size=16,
        crops__num_local=4,
    )
    done = dinoscale("train", "vit_t16", *run)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == list(range(1, STEPS + 1))
    return np.array(list(losses.values()))


@pytest.mark.slow
def test_loss_curves_of_both_paths_differ_far_less_than_from_step_to_step(tmp_path: Path) -> None:
    fast = _losses(tmp_path / "fast", colors="device")
    slow = _losses(tmp_path / "slow", colors="workers")
    noise = np.sqrt((np.diff(fast[-50:]) ** 2).mean())
    assert np.sqrt(((fast - slow) ** 2).mean()) < 0.05 * noise
    assert (fast != slow).any()  # they did take different paths


def test_both_paths_draw_the_same_parameters_in_every_step() -> None:
    drawn = []
    for plain in (False, True):
        batches = train_batches(
            open_source(SOURCE),
            MultiCrop(global_size=32, local_size=16, num_local=4, plain=plain),
            batch_size=BATCH,
            micro_batch_size=BATCH,
            seed=0,
            rank=0,
            world_size=1,
            start_step=0,
            stop_step=20,
            num_workers=0,
        )
        drawn.append(np.stack([batch.params for batch in batches]))
    assert drawn[0].shape == (20, 6, BATCH)
    np.testing.assert_array_equal(*drawn)
