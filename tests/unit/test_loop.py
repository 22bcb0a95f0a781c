"""A log line needs no collective: values of other ranks have come with the step's reduction."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dinoscale.config.resolve import resolve
from dinoscale.data.sources.bad_samples import BadSample, BadSampleLog
from dinoscale.engine.build import loss_weights_of, schedules_of
from dinoscale.errors import DataError, LostPeerError, NonFiniteError
from dinoscale.runtime.launcher_env import Process
from dinoscale.training import loop
from dinoscale.training.hooks.data_wait import DataWait
from dinoscale.training.hooks.metrics import Stopwatch
from dinoscale.training.loop import Run
from tests.distributed.tiny_run import tiny_config


class SilentGroup(dist.ProcessGroup):
    """Two ranks that cannot say anything to each other."""

    def getBackendName(self) -> str:  # noqa: N802  # torch's name
        return "silent"


@pytest.fixture
def silent() -> Iterator[None]:
    """A job in which every collective is an error."""
    dist.Backend.register_backend(
        "silent", lambda _store, rank, size, _timeout: SilentGroup(rank, size), devices=["cpu"]
    )
    dist.init_process_group("silent", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def _logging_run(folder: Path) -> Any:
    run: Any = Run.__new__(Run)
    run.config = tiny_config()
    run.loss_weights = loss_weights_of(run.config)
    run.plan = resolve(run.config, world_size=2, num_images=1200)
    run.process, run.steps_taken, run.pending_bad, run.last = Process(0, 2, 0, 2), 7, [], {}
    run.bad = BadSampleLog(folder / "bad_samples.jsonl", writes=False)
    run.data_wait = DataWait(num_workers=1, cores=2, ranks_here=2, on_cpu=True)
    run.progress, run.metrics = SimpleNamespace(skipped_steps=0), MagicMock()
    run.student, run.teacher = MagicMock(), MagicMock()
    run.student.grad_norm.return_value = run.teacher.center.norm.return_value = torch.ones(())
    return run


def _record(run: Any, *, bad_images: int) -> dict[str, float]:
    result = SimpleNamespace(loss=3.0, teacher_entropy=2.0, kl=1.0, bad_images=bad_images)
    result.waited_s, result.terms = 1e9, {}
    readings = {"class": MagicMock()}
    run._record(7, MagicMock(), result, readings, Stopwatch())
    return dict(run.metrics.write.call_args[0][1])


@pytest.mark.usefixtures("silent")
def test_log_line_takes_no_collective_unless_there_are_bad_images(tmp_path: Path) -> None:
    run = _logging_run(tmp_path)
    assert _record(run, bad_images=0)["data_wait"] > 1  # of the rank that waited longest
    with pytest.raises(RuntimeError, match="No backend type"):
        _record(run, bad_images=1)


def test_every_rank_counts_the_bad_images_and_stops_alike(tmp_path: Path) -> None:
    run = _logging_run(tmp_path)
    run.pending_bad = [BadSample("a.jpg", "cut off", 1, 2, 0)]
    assert _record(run, bad_images=1)["bad_samples"] == 1
    run.pending_bad = [BadSample(f"{i}.jpg", "cut off", 1, 2, 0) for i in range(12)]
    with pytest.raises(DataError, match="too many unreadable images: 13 of 42 drawn"):
        _record(run, bad_images=12)
    assert not list(tmp_path.iterdir())  # another rank writes the list


@pytest.mark.parametrize(("error", "waits"), [(DataError("x"), 1), (LostPeerError("x"), 0)])
def test_an_error_waits_for_the_checkpoint_being_written(error: Exception, waits: int) -> None:
    run: Any = Run.__new__(Run)
    run.config, run.resumed_at, run.process = tiny_config(), None, MagicMock()
    run.stopping, run.saved_step = False, None
    run.measurements, run.teacher = MagicMock(asked_to_stop=False), MagicMock()
    run.progress, run.watchdog = MagicMock(step=0, guarded=None), MagicMock()
    run.plan = MagicMock(stop_step=1, steps_per_epoch=1)
    run.saver = MagicMock()
    run.saver.wait.return_value = None
    run.data_wait, run.feed = MagicMock(), MagicMock()
    run.data_wait.restarted.side_effect = error
    with pytest.raises(type(error)):
        run.train()
    assert run.saver.wait.call_count == waits
    run.feed.close.assert_called_once()  # its thread reads ahead


def test_the_loader_is_told_which_steps_have_a_gram_loss() -> None:
    run: Any = Run.__new__(Run)
    curve = {"start": 0.0, "peak": 0.0, "end": 2.0, "warmup_epochs": 1, "cosine_epochs": 1}
    run.config = tiny_config(
        gram={"loss_weight": 1.0, "teacher": "weights.pth"},
        schedules={"gram_weight": curve},
    )
    run.plan = resolve(run.config, world_size=1, num_images=12)  # 2 steps an epoch
    run.schedules = schedules_of(run.config, run.plan)
    run.feed, run.data_wait = MagicMock(), MagicMock()
    run.progress, run.plan = SimpleNamespace(step=0, data_offset=5), MagicMock(stop_step=0)
    run._take_steps()
    told = run.feed.steps.call_args.kwargs
    assert told["offset"] == 5
    assert [told["gram_counts"](step) for step in range(5)] == [False, False, False, True, True]


@pytest.mark.parametrize("distill", [{}, {"targets": "out", "class_feature_weight": 1.0}])
def test_images_may_be_skipped_unless_targets_are_stored_of_them(
    monkeypatch: pytest.MonkeyPatch, distill: dict[str, Any]
) -> None:
    monkeypatch.setattr(loop, "find_checkpoint", lambda *_: None)
    run: Any = Run.__new__(Run)
    run.config, run.run_dir, run.saved_step = tiny_config(distill=distill), Path("run"), None
    run.progress = SimpleNamespace(step=7, bad_in_a_row=3, rollbacks=0)
    run.watchdog, run.events = MagicMock(), MagicMock()
    with pytest.raises(NonFiniteError, match="steps in a row were skipped") as raised:
        run._roll_back(SimpleNamespace(skipped="loss is nan"))
    assert ("max_rollbacks" in str(raised.value)) == (not distill)
