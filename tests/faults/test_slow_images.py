"""A run whose images arrive slowly warns about it."""

import json
from pathlib import Path

import pytest

from tests.faults.run_processes import RunProcesses, write_config


@pytest.mark.distributed
def test_slow_images_are_seen_in_the_metrics_and_warned_of_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, stage=0, epochs=2)
    short = ("data.num_workers=1", "train.stop_after_steps=3", "checkpoint.every_steps=100")
    run = RunProcesses(config, *short, slow_images_s=0.2)
    assert run.end() == [0, 0], run.said()
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    waits = [record["data_wait"] for record in map(json.loads, lines) if "data_wait" in record]
    assert len(waits) == 3
    assert waits[-1] > 0.5
    said = run.said()
    assert said.count("raise data.num_workers") + said.count("use a machine with more") == 1
    assert "data wait " in run.said()
