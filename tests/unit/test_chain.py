"""What is found out about a chain of phases before the first of them is trained."""

from pathlib import Path
from typing import Any

import pytest

from dinoscale.checkpoint.layout import directory
from dinoscale.config import RunConfig, parse_config, phases_of
from dinoscale.errors import ConfigError
from dinoscale.training.phases import require_gram_teachers
from tests.distributed.tiny_run import tiny_config


def _chain(run_dir: Path, teacher: Path | str, *, weight: float = 1.0) -> RunConfig:
    gram: dict[str, Any] = {"loss_weight": weight, "teacher": str(teacher)}
    phases = [{"name": "first"}, {"name": "second"}, {"name": "third", "change": {"gram": gram}}]
    return parse_config(tiny_config(str(run_dir)).model_dump() | {"phases": phases})


def _require(config: RunConfig) -> None:
    require_gram_teachers(config, phases_of(config))


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
    for path in ("{run_dir}/phases/02_second", "{run_dir}/phases/01_first/checkpoints/step_7"):
        _require(_chain(tmp_path / "run", path))


def test_weights_that_nobody_reads_may_be_missing(tmp_path: Path) -> None:
    _require(_chain(tmp_path / "run", "nowhere", weight=0.0))
    config = _chain(tmp_path / "run", "nowhere")
    directory(Path(phases_of(config)[-1].run_dir), 3).mkdir(parents=True)  # it has begun
    _require(config)


def test_a_run_of_one_part_names_the_setting_alone(tmp_path: Path) -> None:
    config = phases_of(_chain(tmp_path, "{run_dir}/phases/01_first"))[-1]
    with pytest.raises(ConfigError, match=rf"^gram.teacher: {tmp_path}/phases/01_first: No such"):
        _require(config)
