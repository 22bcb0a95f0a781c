"""What a process takes as a wish to stop, and what it does not."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

_PROGRAM = """
    import os, signal, sys
    from dinoscale import preemption
    preemption._AGAIN_S = 0.0 if "later" in sys.argv else 60.0
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    stop = preemption.StopRequest(answer=True)
    for number in sys.argv[1].split(","):
        os.kill(os.getpid(), int(number))
    print(stop.reason)
"""


def _after(*numbers: int, later: bool = False) -> subprocess.CompletedProcess[str]:
    words = [",".join(str(int(number)) for number in numbers), *(["later"] if later else [])]
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
    done = _after(signal.SIGINT, signal.SIGINT, later=True)
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr
