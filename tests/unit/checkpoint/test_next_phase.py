"""Which phase is taken up next where phases begin at the end of the same one."""

import logging
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from dinoscale.checkpoint.layout import checkpoints, shard_file
from dinoscale.checkpoint.next_phase import NextPhase, find_next_phase
from dinoscale.cluster.doctor.storage import check_resume
from dinoscale.config import RunConfig, parse_config, phases_of
from dinoscale.training.trainer import _choose_phase
from tests.distributed.tiny_run import tiny_config
from tests.unit.checkpoint.stored import store

_STEPS = 4  # of each phase
_PLAN = {"steps_per_epoch": 1}


def _config(folder: Path) -> RunConfig:
    """Phases begun, one and other, both after begun, and last, which comes after other."""
    phases = [{"name": "begun"}, {"name": "one"}, {"name": "other", "after": "begun"}]
    values = tiny_config(run_dir=str(folder), train={"epochs": _STEPS}).model_dump()
    return parse_config(values | {"phases": [*phases, {"name": "last"}]})


def _next(config: RunConfig, **steps: int) -> NextPhase:
    """The next phase, after checkpoints of some phases at these steps have been added."""
    runs = phases_of(config)
    for phase, run in zip(config.phases, runs, strict=True):
        if phase.name in steps:
            store(Path(run.run_dir), steps[phase.name], ranks=1, plan=_PLAN)
    return find_next_phase(config, runs)


def test_phases_follow_in_the_order_of_the_file_until_all_are_finished(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert _next(config) == NextPhase(0, begins=True)
    assert _next(config, begun=2) == NextPhase(0, begins=False)
    assert _next(config, begun=_STEPS) == NextPhase(1, begins=True)
    assert _next(config, one=2) == NextPhase(1, begins=False)
    assert _next(config, one=_STEPS) == NextPhase(2, begins=True)
    assert _next(config, other=_STEPS) == NextPhase(3, begins=True)
    assert _next(config, last=_STEPS) == NextPhase(3, begins=False)


def test_a_phase_that_was_passed_over_is_trained_though_a_later_one_is_finished(
    tmp_path: Path,
) -> None:
    config = _config(tmp_path)
    assert _next(config, begun=_STEPS, other=_STEPS) == NextPhase(1, begins=True)
    assert check_resume(config).text == "begins phase one"
    assert _next(config, one=1) == NextPhase(1, begins=False)
    assert check_resume(config).text.endswith("02_one/checkpoints/step_00000001")
    assert _next(config, one=_STEPS) == NextPhase(3, begins=True)


@pytest.mark.parametrize(
    ("steps", "index", "begins", "said"),
    [
        ({"begun": 2, "one": 4}, 0, False, "but one began where it stood: it is taken up again"),
        ({"begun": 2, "one": 4, "other": 4}, 3, True, "but one and other began where it stood: it"),
        ({"one": 2, "last": 4}, 1, False, ""),  # checkpoints of others were deleted
        ({"one": 4}, 2, True, ""),
    ],
)
def test_what_becomes_of_a_phase_before_its_end_is_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    steps: dict[str, int],
    index: int,
    begins: bool,
    said: str,
) -> None:
    with caplog.at_level(logging.WARNING, logger="dinoscale"):
        assert _next(_config(tmp_path), **steps) == NextPhase(index, begins=begins)
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)


@pytest.mark.parametrize(("damaged", "chosen"), [(0, 0), (1, 2)])
def test_a_phase_begins_where_the_checkpoint_that_it_goes_on_from_is_intact(
    tmp_path: Path, damaged: int, chosen: int
) -> None:
    config = _config(tmp_path)
    runs = phases_of(config)
    _next(config, begun=2, one=2)
    assert _next(config, begun=_STEPS, one=_STEPS) == NextPhase(2, begins=True)
    newest = checkpoints(Path(runs[damaged].run_dir))[-1]
    shard = newest / shard_file(0)
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")  # only its checksum tells
    assert _choose_phase(config, runs, MagicMock()) == chosen
    assert newest.exists() == (damaged == 1)  # that of a phase beside it is left alone
