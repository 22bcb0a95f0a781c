"""What is found out about a chain of phases before the first of them is trained."""

from pathlib import Path
from typing import Any

import pytest

from dinoscale.checkpoint.layout import directory
from dinoscale.config import RunConfig, parse_config, phases_of, resolve
from dinoscale.errors import ConfigError, DataError
from dinoscale.training.phases import require_kept_steps, require_teachers
from tests.distributed.tiny_run import tiny_config

_OF_FIRST = "{{run_dir}}/phases/01_first/checkpoints/step_{:08d}"


def _chain(
    run_dir: Path, teacher: Path | str, *, weight: float = 1.0, **first: dict[str, Any]
) -> RunConfig:
    """Three phases, the first with changes; of known length with train.steps_per_epoch."""
    gram: dict[str, Any] = {"loss_weight": weight, "teacher": str(teacher)}
    phases = [
        {"name": "first", "change": first},
        {"name": "second"},
        {"name": "third", "change": {"gram": gram}},
    ]
    return parse_config(tiny_config(str(run_dir)).model_dump() | {"phases": phases})


def _require(config: RunConfig) -> None:
    require_teachers(config, phases_of(config))


def test_missing_weights_of_a_phase_to_come_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "weights.pth"
    with pytest.raises(ConfigError) as refused:
        _require(_chain(tmp_path / "run", missing))
    said = f"phases.third.gram.teacher: {missing}: No such file or directory; give weights that"
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)
    missing.touch()
    _require(_chain(tmp_path / "run", missing))


@pytest.mark.parametrize("path", ["weights.pth/inside", "nul\0byte"])
def test_what_cannot_be_a_file_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ConfigError, match=r"^phases.third.gram.teacher: "):
        _require(_chain(tmp_path / "run", f"{tmp_path}/{path}"))


def test_weights_that_an_earlier_phase_writes_may_be_missing(tmp_path: Path) -> None:
    for path in ("{run_dir}/phases/02_second", _OF_FIRST.format(7)):
        _require(_chain(tmp_path / "run", path))  # how long it is depends on the images


@pytest.mark.parametrize("path", ["checkpoints/step_7", "checkpoints", "step_00000007", "x.pth"])
def test_what_no_phase_writes_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _require(_chain(tmp_path / "run", f"{{run_dir}}/phases/01_first/{path}"))
    folder = f"{tmp_path}/run/phases/01_first"
    assert str(refused.value) == (
        f"phases.third.gram.teacher: {folder}/{path} is nothing that phase first writes; give "
        f"{folder} for its last checkpoint, or a step in eight digits, such as "
        f"{folder}/checkpoints/step_00000200"
    )


# Two epochs of 10 steps; a checkpoint after each of them, and after every 4 steps.
_LENGTH = {"train": {"epochs": 2, "steps_per_epoch": 10}, "checkpoint": {"every_steps": 4}}


@pytest.mark.parametrize("step", [4, 8, 10, 20])
def test_steps_that_are_written_are_taken(tmp_path: Path, step: int) -> None:
    _require(_chain(tmp_path, _OF_FIRST.format(step), **_LENGTH))


@pytest.mark.parametrize("step", [7, 24, 30])
def test_steps_that_are_never_written_are_refused(tmp_path: Path, step: int) -> None:
    config = _chain(tmp_path, _OF_FIRST.format(step), **_LENGTH)
    first, _, third = phases_of(config)
    never = (
        "no checkpoint of this step is written; of 20 steps, they are written after every 10 "
        "(checkpoint.every_epochs), every 4 (checkpoint.every_steps) and at the end, so name one "
        "of these"
    )
    with pytest.raises(ConfigError) as refused:
        _require(config)
    assert str(refused.value) == f"phases.third.gram.teacher: {third.gram.teacher}: {never}"
    with pytest.raises(ConfigError) as refused:  # once the images are counted
        require_kept_steps(first, resolve(first, world_size=1, num_images=60))
    assert str(refused.value) == f"checkpoint.keep_steps: {step}: {never}"
    directory(Path(first.run_dir), step).mkdir(parents=True)  # by other settings
    _require(config)
    require_kept_steps(first, resolve(first, world_size=1, num_images=60))


def test_a_step_that_a_phase_has_passed_and_not_kept_is_refused(tmp_path: Path) -> None:
    config = _chain(tmp_path, _OF_FIRST.format(4), **_LENGTH)
    directory(Path(phases_of(config)[0].run_dir), 8).mkdir(parents=True)
    with pytest.raises(ConfigError, match="step_00000004 is gone, and phase first is past that"):
        _require(config)


def test_a_phase_keeps_the_steps_that_later_ones_name(tmp_path: Path) -> None:
    for teacher, steps in ((_OF_FIRST.format(7), (7,)), ("{run_dir}/phases/01_first", ())):
        runs = phases_of(_chain(tmp_path, teacher))
        assert [run.checkpoint.keep_steps for run in runs] == [steps, (), ()]
    given = phases_of(_chain(tmp_path, _OF_FIRST.format(7), checkpoint={"keep_steps": [9, 3]}))
    assert given[0].checkpoint.keep_steps == (3, 7, 9)
    assert not phases_of(_chain(tmp_path, _OF_FIRST.format(7), weight=0.0))[0].checkpoint.keep_steps


def test_weights_that_nobody_reads_may_be_missing(tmp_path: Path) -> None:
    _require(_chain(tmp_path / "run", "nowhere", weight=0.0))
    config = _chain(tmp_path / "run", "nowhere")
    directory(Path(phases_of(config)[-1].run_dir), 3).mkdir(parents=True)  # it has begun
    _require(config)


def test_a_run_of_one_part_names_the_setting_alone(tmp_path: Path) -> None:
    config = phases_of(_chain(tmp_path, "{run_dir}/phases/01_first"))[-1]
    with pytest.raises(ConfigError, match=rf"^gram.teacher: {tmp_path}/phases/01_first: No such"):
        _require(config)


def _distilled(run_dir: Path, teacher: str) -> RunConfig:
    """Two phases, of which the second learns from another teacher than the first."""
    (run_dir.parent / "first.pth").touch()
    distill = {"teacher": str(run_dir.parent / "first.pth"), "class_feature_weight": 1.0}
    phases = [
        {"name": "first"},
        {"name": "second", "change": {"distill": {"teacher": teacher}}},
    ]
    plain = tiny_config(str(run_dir), distill=distill).model_dump()
    return parse_config(plain | {"phases": phases})


def test_a_frozen_teacher_of_a_phase_to_come_is_looked_for(tmp_path: Path) -> None:
    config = _distilled(tmp_path / "run", f"{tmp_path}/nowhere")
    with pytest.raises(ConfigError, match=r"^phases.second.distill.teacher: .*nowhere: No such fi"):
        _require(config)
    directory(Path(phases_of(config)[1].run_dir), 3).mkdir(parents=True)  # it has begun
    _require(config)


def test_an_earlier_phase_may_write_the_frozen_teacher(tmp_path: Path) -> None:
    config = _distilled(tmp_path / "run", "{run_dir}/phases/01_first")
    _require(config)
    assert phases_of(config)[1].distill.teacher == f"{tmp_path}/run/phases/01_first"
    runs = phases_of(_distilled(tmp_path / "run", _OF_FIRST.format(7)))
    assert [run.checkpoint.keep_steps for run in runs] == [(7,), ()]
    with pytest.raises(ConfigError, match=r"second.distill.teacher: .* not in the folder of an ea"):
        phases_of(_distilled(tmp_path / "run", "{run_dir}/phases/02_second"))


def test_stored_targets_of_a_phase_to_come_are_looked_for(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    distill = {"class_feature_weight": 1.0}
    first = {"distill": {"teacher": str(tmp_path / "first.pth"), **distill}}
    second = {"distill": {"targets": "{run_dir}/targets", "teacher": None, **distill}}
    phases = [{"name": "first", "change": first}, {"name": "second", "change": second}]
    config = parse_config(tiny_config(str(run_dir)).model_dump() | {"phases": phases})
    (tmp_path / "first.pth").touch()
    assert phases_of(config)[1].distill.targets == f"{run_dir}/targets"
    says = f"{run_dir}/targets has no manifest.json and is not there; compute them with `dinosc"
    with pytest.raises(DataError, match=f"^phases.second.distill.targets: {says}"):
        _require(config)
    with pytest.raises(DataError, match=f"^distill.targets: {says}"):
        _require(phases_of(config)[1])
    (run_dir / "targets").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"^phases.second.distill.targets: .* is not finished: start the com"
    ):
        _require(config)
