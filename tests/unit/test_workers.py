"""Sessions of pytest-xdist that lose a worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import ROOT

_CONFTEST = """
import os, time
from tests.conftest import pytest_sessionfinish, pytest_testnodedown

def pytest_collection_modifyitems():
    if os.environ["WHEN"] == os.environ.get("PYTEST_XDIST_WORKER"):
        time.sleep(1)  # the other one has collected
        os._exit(9)
"""
_TEST = """
import os

def test_passes():
    if os.environ["WHEN"] == "test":
        os._exit(9)
"""


@pytest.mark.parametrize("when", ["gw1", "test", "never"])
def test_a_session_that_loses_a_worker_fails(tmp_path: Path, when: str) -> None:
    (tmp_path / "conftest.py").write_text(_CONFTEST)
    (tmp_path / "test_a.py").write_text(_TEST)
    (tmp_path / "test_b.py").write_text("def test_passes(): ...")
    words = ["-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile", "--max-worker-restart", "0"]
    kept = {name: text for name, text in os.environ.items() if "PYTEST" not in name}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=kept | {"WHEN": when, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode == 0) == (when == "never"), ended.stdout + ended.stderr
