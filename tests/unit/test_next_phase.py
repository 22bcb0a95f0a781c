"""Which phase is taken up, and what is said of one that is passed over."""

import logging
from pathlib import Path

import pytest

from dinoscale.checkpoint.layout import directory
from dinoscale.config import load_config, phases_of
from dinoscale.training.phases import NextPhase, next_phase

_CHAIN = """\
defaults: [quickstart]
phases:
- name: first
- name: second
- name: other
  after: first
"""


def test_a_phase_that_is_passed_over_is_named_with_the_later_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(_CHAIN)
    config = load_config(str(path), [f"run_dir={tmp_path / 'run'}"])
    runs = phases_of(config)
    for run in runs[1:]:
        directory(Path(run.run_dir), 1).mkdir(parents=True)
    with caplog.at_level(logging.WARNING, logger="dinoscale"):
        assert next_phase(config, runs) == NextPhase(2, begins=False)
    (said,) = [record.getMessage() for record in caplog.records if "phase" in record.getMessage()]
    assert said == (
        "phase second has not reached its end and is not taken up again, as a later one has begun,"
        " other"
    )
