"""The guard of whole runs on 2 ranks: silent, stopped or rolled back; the best is exported.

Weights of a run of ours stand for published ones; the runs that begin with them differ in their
rate alone. All starts are trained in one launch.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoscale.checkpoint.layout import START_FILE, checkpoints, directory
from dinoscale.checkpoint.load import Checkpoint
from dinoscale.config import RunConfig
from dinoscale.convert.run_checkpoint import read_run
from dinoscale.convert.source import read_source
from dinoscale.runtime.outputs import BEST_WEIGHTS
from tests.distributed.tiny_run import tiny_config
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

EVERY, STEPS = 4, 16
GOOD, RUIN = 0.01, 0.3  # rates: x 30
_LABELLED = "synthetic:shapes?images=160&size=16&seed="
_BY_KNN = {"measure": "knn_top1", "images": None, "max_fall": 1.0, "min_agreement": 0.7}
# Name of a run -> its starts: rate, steps, settings of the guard, ZeRO stage.
STARTS: dict[str, list[tuple[float, int, dict[str, Any], int]]] = {
    "silent": [(GOOD, 12, {"on_fall": "stop"}, 0)],
    "stopped": [
        *2 * [(RUIN, 12, {"on_fall": "stop"}, 2)],
        (RUIN, 12, {"on_fall": "warn"}, 1),
    ],
    "rolled_back": [
        (GOOD, 8, _BY_KNN | {"on_fall": "roll_back"}, 3),
        (RUIN, STEPS, _BY_KNN | {"on_fall": "roll_back"}, 3),
        (GOOD, STEPS, _BY_KNN | {"on_fall": "roll_back"}, 3),
    ],
    "undisturbed": [(GOOD, STEPS, _BY_KNN, 3)],
}


def _config(root: str, name: str, start: tuple[float, int, dict[str, Any], int]) -> RunConfig:
    lr, steps, guard, stage = start
    held_out = {"every_steps": EVERY, "images": "synthetic:shapes?images=96&size=16&seed=9"}
    labelled = {"train": f"{_LABELLED}3", "test": f"{_LABELLED}4", "k": 5, "every_epochs": 1000}
    is_source = name == "source"
    return tiny_config(
        run_dir=f"{root}/{name}",
        dino={"momentum_end": 0.9},
        data={"train": "synthetic:shapes?images=64&size=16"},
        checkpoint={"keep_last": 100 if name == "undisturbed" else 2},
        engine={"zero_stage": stage, "precision": "fp32"},
        optim={"lr": lr},
        eval=labelled if guard.get("measure") == "knn_top1" else {},
        guard={} if is_source else held_out | guard,
        train={
            **{"epochs": 8, "batch_size": 8, "micro_batch_size": 4, "stop_after_steps": steps},
            **({} if is_source else {"init_from": f"{root}/source", "init_head": True}),
        },
    )


def train_all(root: str) -> dict[str, list[str]]:
    """On every rank: all starts of all runs, and how each ended."""
    from dinoscale.errors import RunFailedError
    from dinoscale.runtime import distributed
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.trainer import train

    ends: dict[str, list[str]] = {}
    for name, starts in {"source": [(0.02, 64, {}, 2)], **STARTS}.items():
        for number, start in enumerate(starts):
            try:
                train(_config(root, name, start), read_process(os.environ))
                end = "done"
            except RunFailedError as error:
                end = str(error)
            ends.setdefault(name, []).append(end)
            weights = Path(root) / name / BEST_WEIGHTS
            if distributed.rank() == 0 and weights.exists():
                weights.with_name(f"after_{number}.safetensors").write_bytes(weights.read_bytes())
    return ends


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; `ends.json` has what rank 0 says, which all ranks say."""
    root = tmp_path_factory.mktemp("guarded")
    function = "tests.distributed.test_guard:train_all"
    first, second = run_distributed(function, world_size=2, timeout_s=580, root=str(root))
    assert first == second
    (root / "ends.json").write_text(json.dumps(first))
    return root


def _ends(root: Path, name: str) -> list[str]:
    ends: list[str] = json.loads((root / "ends.json").read_text())[name]
    return ends


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _measured(run: Path, name: str) -> dict[int, float]:
    """A number of the log by step."""
    return {line["step"]: line[name] for line in _lines(run / "metrics.jsonl") if name in line}


def _require_exported(weights: Path, run: Path, *, step: int) -> None:
    exported = read_source(weights, network="teacher").backbone
    saved = read_run(directory(run, step), network="teacher").backbone
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)


def test_without_a_guard_nothing_is_measured_or_written(root: Path) -> None:
    run = root / "source"
    assert _measured(run, "guard_rankme") == {}
    assert not (run / START_FILE).exists()
    assert not (run / BEST_WEIGHTS).exists()
    assert directory(run, 0) not in checkpoints(run)


def test_a_healthy_run_is_silent_and_its_best_is_exported(root: Path) -> None:
    run = root / "silent"
    assert _ends(root, "silent") == ["done"]
    (event,) = _lines(run / "events.jsonl")
    assert (event["event"], event["difference"]) == ("features compared", 0)
    ranks = _measured(run, "guard_rankme")
    assert [*ranks] == [0, 4, 8, 12]
    assert _measured(run, "guard_agreement")[0] == 1
    best = max(ranks, key=lambda step: (ranks[step], step))
    _require_exported(run / BEST_WEIGHTS, run, step=best)


def test_a_ruin_is_caught_at_the_first_measurement_and_stops_every_start(root: Path) -> None:
    run, (first, second, third) = root / "stopped", _ends(root, "stopped")
    assert first.startswith(f"step {EVERY}: the teacher has fallen: its RankMe is ")
    assert "Lower optim.lr (now 0.3)" in first
    assert "guard.on_fall=roll_back returns to the best checkpoint, step 0" in first
    assert second == first  # took no step
    assert third == "done"
    kinds = [(line["event"], line["step"]) for line in _lines(run / "events.jsonl")]
    assert kinds[:6] == [
        ("features compared", 0),
        *(("fall", EVERY), ("stopped", EVERY), ("resumed", EVERY), ("stopped", EVERY)),
        ("resumed", EVERY),
    ]
    assert max(_measured(run, "loss")) == 12
    _require_exported(run / BEST_WEIGHTS, run, step=0)  # as the weights it began with


def test_a_fall_rolls_back_to_the_best_and_goes_on_as_if_it_had_not_been(root: Path) -> None:
    run, whole = root / "rolled_back", root / "undisturbed"
    assert [end == "done" for end in _ends(root, "rolled_back")] == [True, False, True]
    end = _ends(root, "rolled_back")[1]
    assert end.startswith("step 12: the teacher has fallen: it shares ")
    (back,) = (e for e in _lines(run / "events.jsonl") if e["event"] == "rolled back")
    knn = _measured(whole, "knn_top1")
    best = max((0, 4, 8), key=lambda step: (knn[step], step))
    assert (back["step"], back["to_step"]) == (12, best)
    assert f"Checkpoints after the best, step {best}, are set aside" in end
    assert (run / "checkpoints" / f"fallen_{directory(run, 12).name}").is_dir()
    _require_exported(run / "after_1.safetensors", whole, step=best)

    assert _ends(root, "undisturbed") == ["done"]
    for name in ("loss", "guard_rankme", "guard_agreement", "knn_top1"):
        assert _measured(run, name) == _measured(whole, name), name
    pair = [Checkpoint(directory(path, STEPS)).progress.guarded for path in (run, whole)]
    assert pair[0] == pair[1]
    assert pair[0] is not None
    _require_exported(run / BEST_WEIGHTS, run, step=pair[0].best_step)
