"""Time and memory of a command, measured by a process that is small itself.

A command begins as a copy of the process that starts it, whose memory counts as the command's: the
kernel keeps the most that either had. So a benchmark with its libraries starts this file, and this
the command.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Used(NamedTuple):
    """What a command and all processes that it waited for used.

    Attributes:
        wall_s: seconds by the clock.
        cpu_s: seconds of all processors.
        peak_mb: the most memory of one process, 10^6 bytes.
    """

    wall_s: float
    cpu_s: float
    peak_mb: int


def measured(command: Sequence[str], **how: Any) -> tuple[str, Used]:
    """Run a command; what it printed on stdout, and used.

    Args:
        command: its words.
        how: `env` and `stderr`, as of `subprocess.Popen`.

    Raises:
        CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "used.json")
        words = [sys.executable, __file__, str(place), *command]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **how)
        try:
            printed, _ = process.communicate()
        except BaseException:
            process.terminate()  # and so the command
            process.wait()
            raise
        if process.returncode:  # the command could not be started
            raise subprocess.CalledProcessError(process.returncode, command)
        found = json.loads(place.read_text())
    if found["code"]:
        raise subprocess.CalledProcessError(found["code"], command)
    return printed, Used(**found["used"])


def _main(place: str, command: Sequence[str]) -> None:
    began = time.monotonic()
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: process.kill())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command as well
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    used = Used(
        wall_s=round(time.monotonic() - began, 2),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 2),
        peak_mb=usage.ru_maxrss * 1024 // 10**6,
    )
    Path(place).write_text(json.dumps({"code": process.returncode, "used": used._asdict()}))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
