"""What the quickstart says of the end of its training."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from dinoscale.errors import DinoscaleError, PreemptedError, RunFailedError
from dinoscale.training import quickstart


@pytest.mark.parametrize(
    ("code", "error"), [(75, PreemptedError), (1, RunFailedError), (2, RunFailedError)]
)
def test_exit_code_of_the_training_is_understood(
    monkeypatch: pytest.MonkeyPatch, code: int, error: type[DinoscaleError]
) -> None:
    command = [sys.executable, "-c", f"raise SystemExit({code})"]
    monkeypatch.setattr(quickstart, "on_this_node", lambda *_, **__: command)
    with pytest.raises(error):
        quickstart._pretrain([])


def test_signal_that_is_ignored_as_by_nohup_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"]
    monkeypatch.setattr(quickstart, "on_this_node", lambda *_, **__: command)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        quickstart._pretrain([])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_reaches_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(100)"]
    monkeypatch.setattr(quickstart, "on_this_node", lambda *_, **__: command)
    before = signal.getsignal(signal.SIGTERM)

    def signal_once_it_is_heard() -> None:  # before that, it would end this process
        while signal.getsignal(signal.SIGTERM) is before:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_once_it_is_heard, daemon=True).start()
    with pytest.raises(PreemptedError, match="the same command goes on"):
        quickstart._pretrain([])
    assert signal.getsignal(signal.SIGTERM) is before


def test_its_words_say_how_to_find_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert quickstart._activated() == ". .venv/bin/activate && "
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / ".venv"))
    assert quickstart._activated() == ""
