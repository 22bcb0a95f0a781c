"""Progress of a run beyond its weights, and the check of the first loss after a resume."""

import os
from dataclasses import asdict
from pathlib import Path

import pytest

from dinoscale.checkpoint.layout import MEASURED_FILE
from dinoscale.checkpoint.progress import Progress, read_measured, write_measured
from dinoscale.errors import CheckpointError


def test_an_accuracy_added_later_is_on_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, done = os.fsync, list[str]()

    def flushed(descriptor: int) -> None:
        done.append(Path(f"/dev/fd/{descriptor}").read_text())
        assert not (tmp_path / MEASURED_FILE).exists()
        flush(descriptor)

    assert read_measured(tmp_path) is None
    monkeypatch.setattr("os.fsync", flushed)
    write_measured(tmp_path, 50)  # as the accuracy of whole per cents comes back from JSON
    assert done == ['{"knn_top1": 50}\n']
    assert read_measured(tmp_path) == 50.0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"knn_top1": true}', '{"knn_top1": NaN}', "9" * 999]
)
def test_an_invalid_accuracy_is_none(tmp_path: Path, text: str) -> None:
    for written in (text, f'{{"knn_top1": 1{"0" * 400}}}'):
        (tmp_path / MEASURED_FILE).write_text(written)
        assert read_measured(tmp_path) is None


def _after(losses: list[float]) -> Progress:
    progress = Progress()
    for loss in losses:
        progress.applied(loss)
    return progress


def test_progress_survives_a_round_trip_as_plain_data() -> None:
    progress = _after([1.5, 1.25])
    progress.skipped()
    progress.measured(40.0)
    assert Progress(**asdict(progress)) == progress


def test_skipped_steps_in_a_row_are_counted_until_one_is_applied() -> None:
    progress = _after([1.0])
    progress.skipped()
    progress.skipped()
    assert (progress.step, progress.bad_in_a_row, progress.skipped_steps) == (3, 2, 2)
    progress.applied(1.0)
    assert (progress.step, progress.bad_in_a_row, progress.skipped_steps) == (4, 0, 2)


def test_accuracy_belongs_to_its_step_and_the_best_stays() -> None:
    progress = _after([1.0])
    progress.measured(40.0)
    progress.applied(1.0)
    assert (progress.knn_top1, progress.best_knn_top1) == (None, 40.0)
    progress.measured(30.0)
    assert (progress.knn_top1, progress.best_knn_top1) == (30.0, 40.0)


def test_loss_near_those_before_is_accepted() -> None:
    progress = _after([6.0 - 0.1 * step for step in range(20)])
    progress.require_near(4.0)
    progress.require_near(4.6)


@pytest.mark.parametrize("loss", [11.09, 0.0])
def test_loss_of_another_network_is_refused_with_an_explanation(loss: float) -> None:
    progress = _after([5.0 + 0.1 * (step % 3) for step in range(40)])
    assert len(progress.losses) == 32
    with pytest.raises(CheckpointError, match=r"the checkpoint at step 40 predicts 5\.\d+ \+-"):
        progress.require_near(loss)


def test_too_few_losses_predict_nothing() -> None:
    _after([5.0] * 7).require_near(100.0)
    with pytest.raises(CheckpointError):
        _after([5.0] * 8).require_near(100.0)
