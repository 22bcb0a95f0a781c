"""A restart of a process keeps its program, its number, and requests to stop."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.forked import ROOT

_PROGRAM = """
import json, os, signal, sys
from dinoscale.runtime.preemption import StopRequest
from dinoscale.cli.restart import restart

stop = StopRequest(answer=False)
if "again" not in sys.argv:
    signal.raise_signal(signal.SIGUSR1)  # no step follows that could notice it
    print(json.dumps([os.getpid(), stop.reason]), flush=True)
    restart(["again"], {**os.environ, "ADDED": "yes"})
print(json.dumps([os.getpid(), stop.reason, sys.argv[1:], os.environ["ADDED"], sys.flags.dev_mode]))
"""


def test_a_request_to_stop_outlives_a_restart(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    done = subprocess.run(
        [sys.executable, "-X", "dev", str(program), "first"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    before, after = map(json.loads, done.stdout.splitlines())
    process, reason = before
    assert reason
    assert after == [process, reason, ["again"], "yes", True]
