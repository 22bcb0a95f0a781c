"""Progress of a run, on a terminal and in a file; time that counts as data wait."""

import logging
import math
import time
from pathlib import Path

import pytest
import torch

from dinoscale.engine.step import StepMetrics
from dinoscale.training.hooks.metrics import Metrics, Stopwatch


def test_a_file_gets_a_line_now_and_then_instead_of_a_bar(
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


def test_only_time_in_which_the_device_idles_counts_as_a_wait_for_data() -> None:
    """The host launches steps of 0.3 s ahead of the device and waits for the loader."""
    shares = []
    for loader_s in (0.29, 0.31, 0.4):  # a batch; the first is ready
        watch, now, free_at = Stopwatch(), 0.0, 0.0
        for step in range(100):
            ready = step * loader_s
            wait = max(0.0, ready - now)
            now += wait
            watch.waited(wait, idle_s=max(0.0, now - free_at))
            free_at = max(now, free_at) + 0.3
            now = max(now + 0.05, free_at - 0.3)  # the result of the step before is read
        watch._begin = time.perf_counter() - free_at
        shares.append(watch.lap(watch.waited_s)["data_wait"])
    assert shares == pytest.approx([0, 0.032, 0.25], abs=0.01)


class _Event:
    def __init__(self, *, done: bool) -> None:
        self.done = done

    def query(self) -> bool:
        return self.done


def test_device_that_computes_a_step_is_not_idle() -> None:
    result = StepMetrics(torch.zeros(6), torch.zeros(3), torch.zeros(1, 2), ())
    assert result.idle_s() == math.inf  # a CPU computes what it asks for
    result._copied = _Event(done=False)  # type: ignore[assignment]  # there is no GPU here
    assert result.idle_s() == 0
