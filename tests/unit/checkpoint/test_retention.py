"""Which checkpoints stay, and that none is ever half deleted."""

import json
from pathlib import Path

from dinoscale.checkpoint.layout import checkpoints, leftovers
from dinoscale.checkpoint.progress import write_measured
from dinoscale.checkpoint.retention import (
    Keep,
    Summary,
    best_of,
    clear_leftovers,
    prune,
    summary,
    superfluous,
)


def _found(knn: dict[int, float | None]) -> list[Summary]:
    return [
        Summary(Path(f"step_{step:08d}"), step, 1, "now", top1, 2, 2) for step, top1 in knn.items()
    ]


def _left(found: list[Summary], keep: Keep) -> list[int]:
    doomed = superfluous(found, keep)
    return [s.step for s in found if s not in doomed]


FOUND = _found({10: 30.0, 20: 50.0, 30: None, 40: 50.0, 50: 20.0, 60: None})


def test_the_newest_stay() -> None:
    assert _left(FOUND, Keep(last=2)) == [50, 60]
    assert _left(FOUND, Keep(last=9)) == [10, 20, 30, 40, 50, 60]


def test_multiples_stay() -> None:
    assert _left(FOUND, Keep(last=1, every_steps=20)) == [20, 40, 60]


def test_the_best_stays_and_of_ties_the_newest() -> None:
    assert _left(FOUND, Keep(last=1, best=True)) == [40, 60]
    assert _left(_found({1: None, 2: None}), Keep(last=1, best=True)) == [2]


def test_best_of_none_measured_is_none() -> None:
    assert best_of(_found({1: None})) is None
    assert best_of([]) is None


def _make(run_dir: Path, step: int, knn: float | None, **checkpoint: object) -> None:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    state = {
        "saved_at": "then",
        "progress": {"knn_top1": knn},
        "plan": {"world_size": 4},
        "config": {"engine": {"zero_stage": 3}, "checkpoint": checkpoint},
    }
    (folder / "state.json").write_text(json.dumps(state))


def test_prune_reads_accuracies_from_the_checkpoints_themselves(tmp_path: Path) -> None:
    for step, knn in ((1, 10.0), (2, 90.0), (3, 20.0), (4, None)):
        _make(tmp_path, step, knn)
    write_measured(checkpoints(tmp_path)[2], 95.0)  # after it was saved
    _make(tmp_path, 5, None)
    (checkpoints(tmp_path)[-1] / "state.json").write_text("{")  # is no newest, and not the best
    deleted = prune(tmp_path, Keep(last=1, best=True), written=checkpoints(tmp_path)[2])
    assert [path.name for path in deleted] == ["step_00000001", "step_00000002"]
    assert [(s.step, s.knn_top1) for s in map(summary, checkpoints(tmp_path))] == [
        *((3, 95.0), (4, None), (5, None)),
    ]
    assert leftovers(tmp_path) == []


def test_steps_that_the_run_names_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _make(tmp_path, step, None, keep_steps=[2])
    deleted = prune(tmp_path, Keep(last=1), written=checkpoints(tmp_path)[-1])
    assert [path.name for path in deleted] == ["step_00000001", "step_00000003"]


def test_the_checkpoint_just_written_stays_beside_later_steps(tmp_path: Path) -> None:
    for step in (5, 100, 200, 300):
        _make(tmp_path, step, None)
    assert prune(tmp_path, Keep(last=3), written=checkpoints(tmp_path)[0]) == []
    deleted = prune(tmp_path, Keep(last=2), written=checkpoints(tmp_path)[0])
    assert [path.name for path in deleted] == ["step_00000100"]


def test_summary_of_an_unreadable_checkpoint_has_its_step_only(tmp_path: Path) -> None:
    _make(tmp_path, 7, None)
    (path,) = checkpoints(tmp_path)
    assert (summary(path).world_size, summary(path).zero_stage) == (4, 3)
    (path / "state.json").write_text('{"saved_at": 1}')
    assert summary(path) == Summary(path, 7, None, None, None, None, None)


def test_only_interrupted_saves_are_deleted(tmp_path: Path) -> None:
    _make(tmp_path, 1, None)
    for name in (".step_00000002.part", ".step_00000003.removed"):
        (tmp_path / "checkpoints" / name).mkdir()
    clear_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
