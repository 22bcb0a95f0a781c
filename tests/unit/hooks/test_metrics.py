"""What a run shows of its progress, on a terminal and in a file."""

import logging
from pathlib import Path

import pytest

from dinoscale.hooks.metrics import Metrics


def test_no_bar_goes_into_a_file_but_a_line_now_and_then(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics(
        tmp_path, active=True, start_step=2, total_steps=5, wandb_project=None, config={}
    )
    for loss in (9.0, 8.0, 7.0):
        metrics.advance(f"loss {loss}")
    metrics.say("k-NN")
    metrics.close()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["step 3 of 5, loss 9.0", "step 5 of 5, loss 7.0"]
    assert capfd.readouterr().err == "k-NN\n"
