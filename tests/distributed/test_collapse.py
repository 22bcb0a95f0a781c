"""Planted collapses are named within fifty steps, on every rank; the quickstart's start is healthy.

All runs are trained on 2 ranks in one launch; the planted ones are the quickstart with a smaller
network.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoscale.config import load_config
from tests.distributed.tiny_run import micro_batches, tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

_OWN = ["engine.precision=fp32", "eval.train=null", "eval.test=null", "log.every_steps=1"]
_SMALL = [
    *("model.embed_dim=32", "model.depth=1", "head.hidden_dim=64", "head.bottleneck_dim=32"),
    *("crops.global_size=16", "crops.local_size=8", "eval.crop=16", "eval.resize=16"),
    *("train.batch_size=32", "train.micro_batch_size=16", "optim.lr=0.016"),
    "data.train=synthetic:shapes?images=320&size=20&seed=1",
]
RUNS = {
    "quickstart": ["train.stop_after_steps=52"],  # planted ones are named within 50
    "no_center": [
        *_SMALL,
        "dino.center_momentum=1.0",
        "train.stop_after_steps=120",
        "train.stop_on_collapse=true",
    ],
    "too_warm": [
        *_SMALL,
        "dino.teacher_temp=0.3",
        "dino.warmup_teacher_temp=0.3",
        "train.stop_after_steps=70",
    ],
}


def train_all(root: str) -> dict[str, Any]:
    """On every rank: train `RUNS`; what each ended with, and mean targets of two steps."""
    from dinoscale.errors import RunFailedError
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.trainer import train

    ends: dict[str, Any] = {"means": _mean_targets()}
    for name, changes in RUNS.items():
        config = load_config("quickstart", [*_OWN, *changes, f"run_dir={root}/{name}"])
        try:
            ends[name] = str(train(config, read_process(os.environ))["steps"])
        except RunFailedError as error:
            ends[name] = str(error)
    return ends


def _mean_targets() -> list[tuple[list[float], list[float]]]:
    """Of two steps of two micro-batches: the teacher's mean target, and that of all its rows."""
    from dinoscale.engine.build import build_pair
    from dinoscale.runtime import distributed

    config = tiny_config(train={"epochs": 5, "batch_size": 8, "micro_batch_size": 2})
    plan = tiny_plan(config)
    student, teacher = build_pair(config, plan)
    pairs = []
    for step in range(2):
        batches = micro_batches(config, plan, step)
        teacher.begin(batches, temp=0.04)
        targets = [
            teacher.targets(batch, temp=0.04, gram_counts=True).class_probs for batch in batches
        ]
        rows = [probs.flatten(0, 1) for probs in targets]
        teacher.update(student, step=0, momentum=0.9, skipped=torch.tensor(False))
        of_ranks = torch.cat(distributed.gather_objects(torch.cat(rows)))
        assert of_ranks.shape == (2 * 8, config.head.num_prototypes)
        pairs.append((teacher.mean_target.tolist(), of_ranks.mean(0).tolist()))
    return pairs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, trained; `ends.json` has what each rank says."""
    root = tmp_path_factory.mktemp("runs")
    function = "tests.distributed.test_collapse:train_all"
    ends = run_distributed(function, world_size=2, timeout_s=580, root=str(root))
    (root / "ends.json").write_text(json.dumps(ends))
    return root


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in _lines(run_dir / "metrics.jsonl") if "loss" in line]


def _ends(root: Path, name: str) -> list[Any]:
    return [of_rank[name] for of_rank in json.loads((root / "ends.json").read_text())]


def test_start_of_the_quickstart_raises_nothing(root: Path) -> None:
    assert _lines(root / "quickstart" / "events.jsonl") == []
    assert _ends(root, "quickstart") == ["52", "52"]


def test_mean_target_is_that_of_all_rows_of_the_step(root: Path) -> None:
    for pairs in _ends(root, "means"):
        assert len(pairs) == 2
        for mean, of_rows in pairs:
            assert mean == pytest.approx(of_rows, abs=1e-6)
            assert sum(mean) == pytest.approx(1, abs=1e-5)


def test_log_of_the_quickstart_has_information_and_share(root: Path) -> None:
    lines = _steps(root / "quickstart")
    assert len(lines) == 52
    assert min(line["target_mutual_information"] for line in lines) > 0.2
    assert max(line["max_prototype_prob"] for line in lines) < 0.25


def test_teacher_too_warm_is_named_uniform_and_only_that(root: Path) -> None:
    (event,) = _lines(root / "too_warm" / "events.jsonl")
    assert (event["event"], event["kind"]) == ("collapse", "uniform")
    assert "dino.teacher_temp (now 0.3" in event["text"]
    lines = _steps(root / "too_warm")
    there = next(line["step"] for line in lines if line["target_mutual_information"] < 0.05)
    assert event["step"] <= there + 50
    assert lines[-1]["target_mutual_information"] < 0.02
    assert _ends(root, "too_warm") == ["70", "70"]


def test_centering_off_is_named_one_hot_and_ends_the_run_on_every_rank(root: Path) -> None:
    (event,) = _lines(root / "no_center" / "events.jsonl")
    assert (event["event"], event["kind"]) == ("collapse", "one_hot")
    assert "dino.center_momentum (now 1;" in event["text"]
    lines = _steps(root / "no_center")
    there = next(line["step"] for line in lines if line["max_prototype_prob"] > 0.5)
    assert event["step"] <= there + 50
    assert lines[-1]["step"] == event["step"]
    for end in _ends(root, "no_center"):
        assert end == f"step {event['step']}: {event['text']} (train.stop_on_collapse)"
