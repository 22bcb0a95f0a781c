"""What long measurements say of their progress."""

import logging

import pytest
from tqdm import tqdm

from dinoscale.evaluate import progress


def test_without_a_terminal_progress_is_lines_of_the_log(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    with caplog.at_level(logging.INFO):
        for _ in tqdm(range(3), unit="img", **progress.bar_options(shown=True)):
            pass
        for _ in tqdm(range(3), unit="img", **progress.bar_options(shown=False)):
            pass
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(" [")[0] for line in said] == ["0% 0/3", "33% 1/3", "67% 2/3", "100% 3/3"]
    assert capsys.readouterr() == ("", "")


def test_a_measurement_of_seconds_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        list(tqdm(range(3), unit="img", **progress.bar_options(shown=True)))
    assert not caplog.records
