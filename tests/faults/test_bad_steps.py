"""Non-finite steps in a whole run: skipped and listed; too many end it or roll it back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dinoscale.checkpoint.layout import directory
from tests.distributed.tiny_run import dinov2
from tests.faults.run_processes import (
    BATCH,
    IMAGES,
    losses,
    newest_step,
    same_checkpoint,
    write_config,
)
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 16
OFTEN = {"every_steps": 1, "keep_last": 100}
RARELY = {"every_steps": 100}  # the result of a step is then read after the next one is launched
RUNS: dict[str, dict[str, Any]] = {
    "healthy": {"bad": [], "checkpoint": RARELY, "train": {"stop_after_steps": 5}},
    "one": {"bad": [5], "checkpoint": {"every_steps": 4}},
    "first": {"bad": [1], "checkpoint": RARELY, "train": {"stop_after_steps": 3}},
    "twice_two": {"bad": [5, 6, 9, 10], "train": {"stop_after_steps": 12}},
    "three": {"bad": [9, 10, 11], "checkpoint": {"every_steps": 4}},
    "rolled_back": {
        "bad": [9, 10, 11],
        "checkpoint": {"every_steps": 4, "keep_last": 100},
        "train": {"max_rollbacks": 1},
    },
    "one_read_late": {"bad": [5], "checkpoint": {"every_steps": 4}, "log": RARELY},
    "rolled_back_late": {
        "bad": [9, 10, 11],
        "checkpoint": {"every_steps": 4, "keep_last": 100},
        "train": {"max_rollbacks": 1},
        "log": RARELY,
    },
    "rolled_back_twice": {
        "bad": [9, 10, 11, 13, 14, 15],
        "checkpoint": {"every_steps": 4, "keep_last": 100},
        "train": {"max_rollbacks": 1},
    },
    "dinov2": {
        "bad": [5],
        "train": {"stop_after_steps": 6},
        # The bad step is one after which the Gram network is refreshed all the same.
        "objective": dinov2(
            "sinkhorn_knopp",
            patch_head=True,
            gram={"loss_weight": 1.0, "refresh_every_steps": 5, "crop_size": 48},
        ),
    },
}


def train_all(configs: dict[str, str], bad: dict[str, list[int]]) -> dict[str, str]:
    """On every rank: train each run, with images of NaN at some steps (from 1) on rank 1."""
    return {name: _train(config, bad[name]) for name, config in configs.items()}


def _train(config_file: str, bad: list[int]) -> str:
    from dinoscale.config import load_config
    from dinoscale.data.order.sampler import StepSampler
    from dinoscale.errors import NonFiniteError
    from dinoscale.runtime import distributed
    from dinoscale.runtime.launcher_env import Process
    from dinoscale.training import feed
    from dinoscale.training.trainer import train

    config = load_config(config_file, [])
    sizes = {"batch_size": BATCH, "micro_batch_size": BATCH // 2, "world_size": 2}
    sampler = StepSampler(sizes=[IMAGES], quotas=[IMAGES], **sizes, seed=config.seed)
    read = feed.Feed.steps

    def poison(self: feed.Feed, first: int, *, offset: int, **more: Any) -> Any:
        # The images are bad, not the step: after a rollback they come at another one.
        found = read(self, first, offset=offset, **more)
        for step, batches in enumerate(found, start=first + offset + 1):
            self.poisoned = step in bad and distributed.rank() == 1
            draws = sampler.micro_batch(step - 1, micro_batch=0, rank=distributed.rank())
            assert batches[0].sample_ids.tolist() == draws.ids.tolist()
            yield batches

    def finish(self: feed.Feed, step: int, index: int, batch: Any) -> Any:
        known.append(len(list(Path(config.run_dir).glob("bad_steps/*"))))
        prepared = make(self, step, index, batch)
        if self.poisoned:
            prepared.local_crops[0, 0, 0, 0, 0] = torch.nan
        return prepared

    known: list[int] = []  # of bad steps, before each step
    make = feed.Feed.finish
    feed.Feed.steps, feed.Feed.finish = poison, finish
    try:
        train(config, Process(distributed.rank(), 2, distributed.rank(), 2))
    except NonFiniteError as error:
        return str(error)
    finally:
        feed.Feed.steps, feed.Feed.finish = read, make
        if distributed.rank() == 0:
            (Path(config.run_dir) / "known.json").write_text(json.dumps(known))
    return "done"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; ends.json says how each ended on each rank."""
    root = tmp_path_factory.mktemp("bad_steps")
    configs, bad = {}, {}
    for name, run in RUNS.items():
        checkpoint, train = run.get("checkpoint", OFTEN), run.get("train", {})
        sections = {"checkpoint": checkpoint, "train": train, "head": {"batch_norm": False}}
        sections |= run.get("objective", {})
        sections["log"] = run.get("log", {})
        path = write_config(root / name, stage=2, epochs=1, **sections)
        configs[name], bad[name] = str(path), run["bad"]
    function = "tests.faults.test_bad_steps:train_all"
    ends = run_distributed(function, world_size=2, timeout_s=500, configs=configs, bad=bad)
    (root / "ends.json").write_text(json.dumps(ends))
    return root


def _ends(root: Path, name: str) -> list[str]:
    return [of_rank[name] for of_rank in json.loads((root / "ends.json").read_text())]


def _events(root: Path, name: str) -> list[dict[str, Any]]:
    path = root / name / "run" / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted(directory(run_dir, step).glob("*.safetensors"))
    assert len(files) == 3
    return {f"{file.name} {k}": v for file in files for k, v in load_file(file).items()}


def test_run_without_bad_numbers_has_no_events(root: Path) -> None:
    assert _ends(root, "healthy") == ["done", "done"]
    assert _events(root, "healthy") == []


@pytest.mark.parametrize(
    ("name", "step"), [*(("twice_two", step) for step in (5, 6, 9, 10)), ("dinov2", 5)]
)
def test_bad_step_changes_nothing(root: Path, name: str, step: int) -> None:
    run_dir = root / name / "run"
    before, after = _weights(run_dir, step - 1), _weights(run_dir, step)
    if name == "dinov2":
        of_ema = {key: value for key, value in before.items() if " ema/backbone." in key}
        before |= {key.replace("ema/", "gram/"): value for key, value in of_ema.items()}
    assert before.keys() == after.keys()
    for tensor in before:
        assert torch.equal(before[tensor], after[tensor]), tensor
    moved, healthy = (_weights(run_dir, {"dinov2": 6, "twice_two": 8}[name] - i) for i in (0, 1))
    assert any(not torch.equal(moved[tensor], healthy[tensor]) for tensor in moved)


def test_steps_before_are_those_of_the_healthy_run_and_training_goes_on(root: Path) -> None:
    healthy, one = losses(root / "healthy" / "run"), losses(root / "one" / "run")
    assert [one[step] for step in range(1, 5)] == [healthy[step] for step in range(1, 5)]
    assert _ends(root, "one") == _ends(root, "twice_two") == ["done", "done"]
    lines = (root / "one" / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if '"loss"' in line]
    assert [r["step"] for r in records if r["loss"] is None] == [5]
    assert [r["skipped_steps"] for r in records] == [0] * 4 + [1] * 12


def test_very_first_step_may_be_bad(root: Path) -> None:
    assert _ends(root, "first") == ["done", "done"]
    first, second = (root / "first" / "run" / "metrics.jsonl").read_text().splitlines()[:2]
    assert json.loads(first)["loss"] is json.loads(first)["grad_norm"] is None
    assert json.loads(second)["skipped_steps"] == 1


def test_dump_names_images_and_the_loss_of_each_rank(root: Path) -> None:
    (event,) = _events(root, "one")
    assert (event["event"], event["step"]) == ("skipped", 5)
    dump = json.loads(Path(event["dump"]).read_text())
    assert (dump["step"], dump["reason"]) == (5, "the loss is not finite")
    (rank_0,), (rank_1,) = dump["ranks"]
    assert isinstance(rank_0["loss"], float)
    assert rank_1["loss"] == "nan"
    assert isinstance(rank_1["teacher_entropy"], float)  # the teacher saw sound images
    ids = rank_0["sample_ids"] + rank_1["sample_ids"]
    assert len(set(ids)) == BATCH
    assert len(rank_1["paths"]) == len(rank_1["sample_ids"]) == BATCH // 2


def test_dump_tells_which_term_of_the_loss_is_bad(root: Path) -> None:
    (event,) = _events(root, "dinov2")
    assert event["reason"] == "the loss is not finite"
    (rank_0,), (rank_1,) = json.loads(Path(event["dump"]).read_text())["ranks"]
    assert (rank_1["loss"], rank_1["dino_loss"]) == ("nan", "nan")
    for part in (rank_0, rank_1):  # a local crop was bad
        assert isinstance(part["ibot_loss"], float)
        assert isinstance(part["koleo_loss"], float)


def test_three_in_a_row_end_the_run_and_name_the_checkpoint(root: Path) -> None:
    for end in _ends(root, "three"):
        assert "3 steps in a row were skipped, the last one step 11" in end
        assert f"continue from {directory(root / 'three' / 'run', 8)}" in end
        assert "bad_steps" in end
    assert newest_step(root / "three" / "run") == 8
    dumps = sorted(path.name for path in (root / "three" / "run" / "bad_steps").iterdir())
    assert dumps == [f"step_{step:08d}.json" for step in (9, 10, 11)]


def test_rollback_continues_with_the_images_after_the_bad_ones(root: Path) -> None:
    assert _ends(root, "rolled_back") == ["done", "done"]
    run_dir, three = root / "rolled_back" / "run", root / "three" / "run"
    assert same_checkpoint(directory(run_dir, 8), directory(three, 8))
    assert [event["event"] for event in _events(root, "rolled_back")][3:] == ["rolled back"]
    assert sorted(losses(run_dir)) == list(range(1, STEPS + 1))
    assert newest_step(run_dir) == STEPS
    state = json.loads((directory(run_dir, STEPS) / "state.json").read_text())
    assert state["progress"]["data_offset"] == 3
    assert state["progress"]["skipped_steps"] == 0


def test_results_that_are_read_late_change_nothing(root: Path) -> None:
    for late, at_once in (("one_read_late", "one"), ("rolled_back_late", "rolled_back")):
        assert _ends(root, late) == ["done", "done"]
        for step in (12, STEPS):
            first, second = (directory(root / name / "run", step) for name in (late, at_once))
            assert same_checkpoint(first, second), (late, step)
        told = [[(e["event"], e["step"]) for e in _events(root, n)] for n in (late, at_once)]
        assert told[0] == told[1]
        dumps = [root / name / "run" / "bad_steps" for name in (late, at_once)]
        texts = [{path.name: path.read_text() for path in dump.iterdir()} for dump in dumps]
        assert texts[0] == texts[1]


def test_a_bad_step_is_known_when_the_next_one_has_been_launched(root: Path) -> None:
    at_once, late = (
        json.loads((root / name / "run" / "known.json").read_text())
        for name in ("one", "one_read_late")
    )
    assert at_once == [0] * 5 + [1] * (STEPS - 5)
    assert late == [0] * 6 + [1] * (STEPS - 6)


def test_rollbacks_are_limited(root: Path) -> None:
    for end in _ends(root, "rolled_back_twice"):
        assert "3 steps in a row were skipped" in end
