"""The host launches a step without reading anything from the device, DeepSpeed included."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.device_reads import DeviceReads
from tests.distributed.tiny_run import dinov2, micro_batches, on_device, tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]

RUNS: list[dict[str, Any]] = [
    {"stage": stage, "precision": precision, "clip_mode": clip_mode}
    for stage in (0, 1, 2, 3)
    for precision, clip_mode in (("bf16", "global"), ("fp32", "per_tensor"))
]
RUNS.append(RUNS[0] | {"name": "sgd"})
RUNS.append(RUNS[0] | {"batch_norm": True, "accumulation": 3})
RUNS += [  # DINOv2's objective; its KoLeo needs two images in a micro-batch
    {"stage": 2, "precision": "bf16", "clip_mode": "per_network", "targets": "centering"},
    {"stage": 3, "precision": "bf16", "clip_mode": "per_network", "targets": "sinkhorn_knopp"},
]
RUNS += [run | {"gram": True} for run in RUNS[-2:]]  # with a refresh in every step
# DeepSpeed asks whether the norm that stage 3 computed is sound; ours is a constant of the host.
CONSTANT = {0: [], 1: [], 2: [], 3: ["is_invalid_grad_norm"]}


def watch_steps(runs: list[dict[str, Any]]) -> list[list[str]]:
    """On every rank: who read from the device in the last step of each run."""
    return [_watch_step(**run) for run in runs]


def _watch_step(
    stage: int,
    precision: str,
    clip_mode: str,
    name: str = "adamw",
    batch_norm: bool = False,
    accumulation: int = 1,
    targets: str | None = None,
    gram: bool = False,
) -> list[str]:
    from dinoscale.engine.build import build_pair, loss_weights_of, schedules_of
    from dinoscale.engine.gradients import compute_device
    from dinoscale.engine.step import train_step

    objective = dinov2(targets, patch_head=targets == "sinkhorn_knopp") if targets else {}
    if gram:
        objective["gram"] = {"loss_weight": 1.0, "refresh_every_steps": 1}
    config = tiny_config(
        **objective,
        head={"batch_norm": batch_norm},
        optim={"name": name, "clip_mode": clip_mode, "clip_grad": 0.5},
        train={"micro_batch_size": 6 // torch.distributed.get_world_size() // accumulation},
        engine={"zero_stage": stage, "precision": precision},
    )
    plan = tiny_plan(config)
    student, teacher = build_pair(config, plan)
    now, device = schedules_of(config, plan).at(0), compute_device()

    def batches(step: int) -> list[Any]:
        return [on_device(batch, device) for batch in micro_batches(config, plan, step)]

    first = 3 if gram else 2  # whose networks have run twice: DeepSpeed then knows their order
    for step in range(first):
        train_step(batches(step), student, teacher, now, loss_weights=loss_weights_of(config))
    last = batches(first)
    with DeviceReads() as reads, _refusing_to_wait(stage):
        result = train_step(last, student, teacher, now, loss_weights=loss_weights_of(config))
    assert result.skipped is None
    assert not gram or teacher.gram.refreshes == first + 1
    if stage == 3:
        assert student._zero._global_grad_norm == 1  # it is our constant that DeepSpeed looked at
    return reads.callers


@contextmanager
def _refusing_to_wait(stage: int) -> Iterator[None]:
    """On a GPU torch itself raises; stage 3 waits once in each backward pass."""
    if torch.cuda.is_available() and stage < 3:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def test_step_reads_nothing_from_the_device() -> None:
    function = f"{__name__}:watch_steps"
    world_size = min(2, torch.cuda.device_count() or 2)
    per_rank = run_distributed(function, world_size=world_size, timeout_s=280, runs=RUNS)
    for of_rank in per_rank:
        for run, callers in zip(RUNS, of_rank, strict=True):
            assert callers == CONSTANT[run["stage"]], run
