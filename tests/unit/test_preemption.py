"""Which signals ask a process to stop, and which end it."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from dinoscale.data.sources.source import open_source
from dinoscale.errors import PreemptedError
from dinoscale.runtime.opening import open_once_per_node
from dinoscale.runtime.preemption import StopRequest
from dinoscale.training.trainer import _unless_asked

_PROGRAM = """
    import os, signal, sys
    from dinoscale.runtime import preemption
    preemption._AGAIN_S = 0.0 if "later" in sys.argv else 60.0
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    stop = preemption.StopRequest(answer=True)
    if "full" in sys.argv:  # as a terminal on Ctrl-S: nothing more is taken
        os.dup2(os.pipe()[1], 2)
        os.set_blocking(2, False)
        try:
            while True:
                os.write(2, b"x")
        except BlockingIOError:
            os.set_blocking(2, True)
    for number in sys.argv[1].split(","):
        os.kill(os.getpid(), int(number))
    print(stop.reason)
"""


def _after(*numbers: int, case: str = "") -> subprocess.CompletedProcess[str]:
    words = [",".join(str(int(number)) for number in numbers), case]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_PROGRAM), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ([signal.SIGTERM, signal.SIGUSR1], "SIGTERM"),
        ([signal.SIGINT, signal.SIGINT], "Ctrl-C"),  # once by hand, once by the launcher
        ([signal.SIGHUP], "None"),
    ],
)
def test_signals_ask_and_the_first_counts(numbers: list[int], reason: str) -> None:
    done = _after(*numbers)
    assert done.stdout == f"{reason}\n", done.stderr
    assert ("Ctrl-C again ends at once" in done.stderr) == (reason == "Ctrl-C")


def test_second_ctrl_c_some_seconds_later_interrupts() -> None:
    done = _after(signal.SIGINT, signal.SIGINT, case="later")
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr


def test_first_ctrl_c_after_another_signal_only_asks() -> None:
    done = _after(signal.SIGTERM, signal.SIGINT, case="later")
    assert done.stdout == "SIGTERM\n", done.stderr
    assert "Ctrl-C again ends at once" in done.stderr


def test_blocked_terminal_does_not_hold_up_a_run() -> None:
    assert _after(signal.SIGINT, case="full").stdout == "Ctrl-C\n"


def test_request_to_stop_is_noticed_while_images_are_listed(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    stop, signs = StopRequest.__new__(StopRequest), list[int]()  # without its handlers
    stop.reason = None

    def sign() -> None:
        signs.append(1)
        stop.ask("SIGTERM")

    opens = _unless_asked(lambda heartbeat: open_source(str(tmp_path), heartbeat=heartbeat), stop)
    with pytest.raises(PreemptedError, match=r"asked to stop \(SIGTERM\)"):
        open_once_per_node(opens, ["a"], sign)
    assert len(signs) == 1
