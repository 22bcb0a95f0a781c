"""Whole runs of the trainer: interrupted and not, split differently over ranks and micro-batches.

Four launches (2, 2, 1 and 3 ranks) make all runs; the tests compare what they left on disk.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dinoscale.checkpoint.layout import EMA, MASTER, directory, shard_file
from dinoscale.checkpoint.load import Checkpoint, open_run
from dinoscale.config import RunConfig
from dinoscale.errors import CheckpointError
from tests.distributed.plain_run import Plain, error, train_plainly
from tests.distributed.tiny_run import tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

STOP, LAST = 3, 7  # steps: interrupted within the first of two epochs of 4, prototypes frozen
KINDS = [f"{stage}_{precision}_adamw" for stage in (2, 3) for precision in ("fp32", "bf16")]
KINDS += ["0_bf16_adamw", "1_fp32_adamw", "0_fp32_sgd"]  # 0_fp32_adamw: faults/test_kills.py
KINDS += ["2_bf16_sgd_bn"]  # bn: batch norm in the head
SPLITS = {"2x6": (2, 6), "2x2x3": (2, 2), "1x12": (1, 12), "1x3x4": (1, 3)}  # ranks, micro-batch
ELASTIC = {"stage3_on_1": (1, "3_fp32_adamw"), "stage0_on_3": (3, "0_fp32_adamw")}
COPIED = ("interrupted", "whole_2_bf16_adamw")  # without and with moments of the prototypes
Copies = Sequence[tuple[str, dict[str, Any]]]


def do_all(runs: list[dict[str, Any]], copies: Copies) -> None:
    """On every rank: train each of `runs`, arguments of `tiny_config`, then make the copies."""
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.trainer import train

    for run in runs:
        train(tiny_config(**run), read_process(os.environ))
    for source, run in copies:
        _load_and_save(Path(source), tiny_config(**run))


def _load_and_save(source: Path, config: RunConfig) -> None:
    """Load the newest checkpoint of a run into a pair built anew, and save that one."""
    from dinoscale.checkpoint.retention import Keep
    from dinoscale.checkpoint.save import Saver
    from dinoscale.engine.build import build_pair
    from dinoscale.training.resume import restore

    checkpoint = open_run(source)
    student, teacher = build_pair(config, tiny_plan(config))
    restore(checkpoint, student, teacher)
    saver = Saver(Path(config.run_dir), Keep(last=1))
    saver.begin(checkpoint.step, student, teacher, {"config": {}, "plan": {}, "progress": {}})
    result = saver.wait()
    assert result is not None
    assert result.error is None


def _run(run_dir: Path, kind: str, stop: int) -> dict[str, Any]:
    stage, precision, optimizer, *more = kind.split("_")
    return {
        "head": {"batch_norm": more == ["bn"]},
        "run_dir": str(run_dir),
        "model": {"drop_path_rate": 0.3},
        "dino": {"momentum": 0.9, "freeze_last_layer_epochs": 1},
        "optim": {"name": optimizer, "lr": 0.02, "warmup_epochs": 1},
        "train": {"epochs": 2, "batch_size": 6, "micro_batch_size": 3, "stop_after_steps": stop},
        "data": {"train": "synthetic:shapes?images=24&size=16", "num_workers": 0},
        "engine": {"zero_stage": int(stage), "precision": precision},
    }


def _split(run_dir: Path, micro_batch: int) -> dict[str, Any]:
    run = _run(run_dir, "2_fp32_adamw", 4)
    images = {"train": "synthetic:shapes?images=24&size=16", "num_workers": 0}
    sizes = {"epochs": 2, "batch_size": 12, "micro_batch_size": micro_batch}
    return run | {"train": sizes, "data": images}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, trained."""
    root = tmp_path_factory.mktemp("runs")

    def launch(world_size: int, jobs: list[dict[str, Any]], copies: Copies = ()) -> None:
        function = "tests.distributed.test_whole_runs:do_all"
        run_distributed(
            function, world_size=world_size, timeout_s=580, runs=jobs, copies=list(copies)
        )

    def splits(ranks: int) -> list[dict[str, Any]]:
        return [_split(root / name, size) for name, (n, size) in SPLITS.items() if n == ranks]

    whole = [_run(root / f"whole_{kind}", kind, LAST) for kind in KINDS]
    begun = [_run(root / f"resumed_{kind}", kind, STOP) for kind in KINDS]
    launch(2, whole + begun + splits(2))
    shutil.copytree(root / "resumed_2_fp32_adamw", root / "interrupted")
    for name in ELASTIC:
        shutil.copytree(root / "interrupted", root / name)
    launch(2, [_run(root / f"resumed_{kind}", kind, LAST) for kind in KINDS])
    for name, (ranks, kind) in ELASTIC.items():
        copies = [
            (str(root / source), _run(root / f"{source}_{name}", kind, LAST)) for source in COPIED
        ]
        launch(ranks, [_run(root / name, kind, LAST), *splits(ranks)], copies)
    return root


def _checkpoint(run_dir: Path, step: int) -> Checkpoint:
    return Checkpoint(directory(run_dir, step))


def _losses(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def test_the_interruption_falls_while_the_prototypes_are_frozen(runs: Path) -> None:
    early = _checkpoint(runs / "interrupted", STOP)
    late = _checkpoint(runs / "whole_2_fp32_adamw", LAST)
    assert early.state["optimizer_steps"] == {"decay": STOP, "no_decay": STOP, "prototypes": 0}
    assert late.state["optimizer_steps"] == {"decay": LAST, "no_decay": LAST, "prototypes": 3}
    moments = set(load_file(early.path / shard_file(1)))
    assert "exp_avg/head.last_layer.weight_v" not in moments
    assert "ema/head.last_layer.weight_v" in moments


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise_identical(runs: Path, kind: str) -> None:
    whole, resumed = runs / f"whole_{kind}", runs / f"resumed_{kind}"
    assert [step for step, *_ in _losses(whole)] == list(range(1, LAST + 1))
    assert _losses(resumed) == _losses(whole)
    paths = [directory(run, LAST) for run in (whole, resumed)]
    names = {path.name for path in paths[0].glob("*.safetensors")}
    assert names == {shard_file(0), shard_file(1), "shared.safetensors"}
    for name in names:
        first, second = (load_file(path / name) for path in paths)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], name


@pytest.mark.parametrize("source", COPIED)
@pytest.mark.parametrize("name", ELASTIC)
def test_loading_on_other_ranks_and_stage_changes_no_bit(
    runs: Path, name: str, source: str
) -> None:
    original, copy = open_run(runs / source), open_run(runs / f"{source}_{name}")
    assert (copy.step, copy.shapes) == (original.step, original.shapes)
    assert copy.state["optimizer_steps"] == original.state["optimizer_steps"]
    assert torch.equal(copy.shared["center"], original.shared["center"])
    steps = original.state["optimizer_steps"]
    resting = set() if steps["prototypes"] else {"head.last_layer.weight_v"}
    for kind in (MASTER, EMA, "exp_avg", "exp_avg_sq"):
        names = original.shapes.keys() - (resting if kind.startswith("exp") else set())
        for tensor in names:
            numel = torch.Size(original.shapes[tensor]).numel()
            first, second = (c.read(kind, tensor, 0, numel) for c in (copy, original))
            assert torch.equal(first, second), (kind, tensor)
    if resting:
        with pytest.raises(CheckpointError, match="0 of 495 elements"):
            copy.read("exp_avg", "head.last_layer.weight_v", 0, 33 * 15)


@pytest.fixture(scope="module")
def plain() -> Plain:
    """The same network and optimizer on images of noise, for what float32 does to them."""
    run = _split(Path("unused"), 12)
    return train_plainly(tiny_config(**run | {"model": {"drop_path_rate": 0.0}}), steps=4)


@pytest.mark.parametrize("name", ELASTIC)
def test_resume_on_other_ranks_and_stage_follows_the_same_run(
    runs: Path, plain: Plain, name: str
) -> None:
    whole, moved = runs / "whole_2_fp32_adamw", runs / name
    _require_close(plain, moved, whole, last=LAST, start=_checkpoint(runs / "interrupted", STOP))


@pytest.mark.parametrize("name", list(SPLITS)[1:])
def test_split_over_ranks_and_micro_batches_changes_nothing(
    runs: Path, plain: Plain, name: str
) -> None:
    one = runs / next(iter(SPLITS))
    _require_close(plain, runs / name, one, last=4, start=_checkpoint(one, 2))


def test_error_of_a_teacher_is_relative_to_how_far_it_moved() -> None:
    def weights(value: float) -> dict[str, torch.Tensor]:
        return {"attn.qkv.bias": torch.full((3000,), value)}

    initial = {"student": weights(9.0), "teacher": weights(1.0)}  # of a run that goes on
    reference = {"initial": initial, "student": weights(10.0), "teacher": weights(2.0)}
    run = {"student": weights(10.0), "teacher": weights(1.5)}
    assert error(run, reference) == pytest.approx(0.5, rel=0.01)  # 99 of 100 weights count


def _require_close(plain: Plain, run: Path, other: Path, *, last: int, start: Checkpoint) -> None:
    found, reference = (
        {
            "losses": [loss for _, loss, _ in _losses(folder)],
            "student": _checkpoint(folder, last).full(MASTER),
            "teacher": _checkpoint(folder, last).full(EMA),
            "initial": {"student": start.full(MASTER), "teacher": start.full(EMA)},
        }
        for folder in (run, other)
    )
    plain.require(found, reference=reference)
