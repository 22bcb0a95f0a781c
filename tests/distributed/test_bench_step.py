"""`bench step` on real ranks: the split is the whole step, both sides are measured."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.tiny_run import tiny_config
from tests.harness import run_distributed

ROUNDED = 5e-3  # of sums of numbers with four digits


def measured(*, train: str | None, with_reference: bool, trace_dir: str | None) -> dict[str, Any]:
    import os
    import time

    from dinoscale.planning.bench.step import bench_step
    from dinoscale.runtime.launcher_env import read_process

    config = tiny_config(
        engine={"precision": "fp32", "zero_stage": 2},
        model={"drop_path_rate": 0.1},
        data={"train": train, "num_workers": 0},
    )
    begin = time.monotonic()
    result = bench_step(
        config,
        read_process(os.environ),
        seconds=0.05,
        turns=2,
        with_reference=with_reference,
        trace_dir=Path(trace_dir) if trace_dir else None,
    )
    return result | {"took_s": time.monotonic() - begin}


def _check_split(result: dict[str, Any]) -> None:
    """Two turns: a median is a mean, so the parts add up."""
    whole = result["seconds_per_step"]["median"]
    assert sum(result["split_s"].values()) == pytest.approx(whole, rel=ROUNDED)
    for part in ("augmentation", "teacher", "student_forward", "loss", "backward"):
        assert result["split_s"][part] > 0, part
    for part in ("optimizer", "ema", "host_to_device", "data"):
        assert result["split_s"][part] > 0, part
    assert result["split_s"]["other"] < whole / 2


@pytest.mark.distributed
def test_one_rank_measures_both_sides() -> None:
    (result,) = run_distributed(
        "tests.distributed.test_bench_step:measured",
        world_size=1,
        timeout_s=120,
        train=None,
        with_reference=True,
        trace_dir=None,
    )
    _check_split(result)
    assert result["communication_s"] == 0
    assert result["no_reference"] is None
    ours, theirs = result, result["reference"]
    for side in (ours, theirs):
        assert side["peak_memory_bytes"] > 100_000
        row = side["images_per_s"]
        assert 0 < row["min"] <= row["median"] <= row["max"]
    assert ours["seconds_without_input"]["median"] < ours["seconds_per_step"]["median"]
    fastest = theirs["seconds_per_step"]["max"] / ours["seconds_without_input"]["min"]
    assert 0 < result["ratio"]["throughput"]["max"] <= fastest * (1 + ROUNDED)
    memory = ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    for end in ("min", "max"):  # nothing of a turn is left in the next
        assert result["ratio"]["peak_memory"][end] == pytest.approx(memory, rel=ROUNDED)
    assert ours["cpu_seconds_per_step"]["min"] > 0
    assert ours["cpu_seconds_per_step"]["max"] < 4 * ours["seconds_per_step"]["max"]
    whole = result["flops_per_image"]["total"] * 6 / result["seconds_per_step"]["median"]
    assert result["flops_per_s"] == pytest.approx(whole, rel=ROUNDED)
    assert 0 < result["utilisation"] < 1


@pytest.mark.distributed
def test_two_ranks_measure_their_own_images_together(tmp_path: Path) -> None:
    first, second = run_distributed(
        "tests.distributed.test_bench_step:measured",
        world_size=2,
        timeout_s=120,
        train="synthetic:shapes?images=24&size=16",
        with_reference=True,
        trace_dir=str(tmp_path / "traces"),
    )
    for result in (first, second):
        _check_split(result)
        assert result["world_size"] == 2
        assert 0 < result["communication_s"] < result["took_s"]
        rate, step_s = result["images_per_s"], result["seconds_per_step"]
        assert rate["max"] == pytest.approx(6 / step_s["min"], rel=ROUNDED)  # of both ranks
        assert result["ratio"]["throughput"]["median"] > 0
    assert first["peak_memory_bytes"] == second["peak_memory_bytes"]  # the largest of the ranks
    for rank in range(2):
        assert "traceEvents" in (tmp_path / "traces" / f"rank{rank}.json").read_text()
