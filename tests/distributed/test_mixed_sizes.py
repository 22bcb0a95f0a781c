"""A run that draws the sizes of its crops for each step: split over ranks, and interrupted."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dinoscale.checkpoint.layout import directory, shard_file
from tests.distributed.tiny_run import dinov2, tiny_config
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STOP, LAST = 3, 6
LOGGED = ("loss", "dino_loss", "ibot_loss", "gram_loss", "grad_norm", "global_size", "local_size")


def _run(run_dir: Path, *, stop: int = LAST, workers: int = 0) -> dict[str, Any]:
    mixture = [
        {"weight": 0.6, "global_size": 32, "local_size": 16, "gram_crop_size": 64},
        {"weight": 0.12, "global_size": 48, "local_size": 16},
        {"weight": 0.28, "global_size": 48, "local_size": 24, "gram_crop_size": 72},
    ]
    train = {"epochs": 2, "batch_size": 4, "micro_batch_size": 2, "stop_after_steps": stop}
    return {"run_dir": str(run_dir)} | dinov2(
        "centering",
        patch_head=False,
        crops={"global_size": 48, "local_size": 24, "mixture": mixture},
        # As many masked patches on each rank: the center of patches averages the ranks' means.
        ibot={"mask_rule": "dinov3", "mask_group": 2},
        koleo={"loss_weight": 0.0},
        gram={"loss_weight": 1.0, "refresh_every_steps": 1},
        engine={"zero_stage": 2, "precision": "fp32"},
        train=train,
        data={"train": "synthetic:shapes?images=16&size=40", "num_workers": workers},
    )


def train_all(runs: list[dict[str, Any]]) -> None:
    """On every rank: train each of `runs`, arguments of `tiny_config`."""
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.trainer import train

    for run in runs:
        train(tiny_config(**run), read_process(os.environ))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On 2 ranks a run, and one that is interrupted; on 1 rank one with 2 micro-batches."""
    root = tmp_path_factory.mktemp("mixed")
    on_two = [
        _run(root / "whole"),
        _run(root / "resumed", stop=STOP, workers=1),
        _run(root / "resumed"),
    ]
    function = "tests.distributed.test_mixed_sizes:train_all"
    for ranks, jobs in ((2, on_two), (1, [_run(root / "accumulated")])):
        run_distributed(function, world_size=ranks, timeout_s=200, runs=jobs)
    return root


def _logged(run_dir: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in LOGGED} for line in lines if "loss" in line]


def test_ranks_and_micro_batches_of_a_step_have_its_sizes(runs: Path) -> None:
    whole, accumulated = _logged(runs / "whole"), _logged(runs / "accumulated")
    assert len(whole) == LAST
    assert len({(line["global_size"], line["local_size"]) for line in whole}) == 3
    assert min(line["gram_loss"] for line in whole[1:]) > 0  # once the first step has given one
    for of_ranks, of_one in zip(whole, accumulated, strict=True):
        assert of_ranks == pytest.approx(of_one, rel=1e-5, abs=1e-7)


def test_resume_is_bitwise_identical_with_and_without_workers(runs: Path) -> None:
    assert _logged(runs / "resumed") == _logged(runs / "whole")
    for rank in (0, 1):
        files = [directory(runs / name, LAST) / shard_file(rank) for name in ("whole", "resumed")]
        first, second = map(load_file, files)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
