"""Processes forked from a server that has the libraries loaded, so that a start costs no imports.

What runs in them is unchanged: a module's own `__main__`, its signals, streams and exit code. What
only a new interpreter can show (import times, variables read by an import, a closed stream) starts
one instead. Forks share a hash seed, so that an order that differs between ranks is for real
launchers to show: in `multinode/`, `e2e/test_launchers.py` and `faults/`, at stages 0, 2 and 3.
"""

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


class Forked:
    """A function in a process of its own; the part of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        output: Path | None = None,
    ) -> None:
        """Start.

        Args:
            function: importable, as are the arguments picklable; its return ends with code 0.
            arguments: of the function.
            environment: all variables; default this process's.
            cwd: working directory.
            output: a file that stdout and stderr are added to; None keeps them for `communicate`.
        """
        self.args = [function.__name__, *map(str, arguments)]
        self._folder = None if output else tempfile.TemporaryDirectory()
        self._streams = [output, output] if output else self._own_files()
        words = {**os.environ, "PYTHONPATH": str(ROOT)} if environment is None else environment
        files = [str(path) for path in self._streams]
        self._process = _context.Process(
            target=_run, args=(dict(words), str(cwd), files, function, arguments)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def _own_files(self) -> list[Path]:
        assert self._folder is not None
        return [Path(self._folder.name) / name for name in ("stdout", "stderr")]

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; its exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, self.said().encode())
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it printed to stdout and to stderr. Raises as `wait`."""
        self.wait(timeout)
        out, said = (path.read_text(errors="replace") for path in self._streams)
        return out, said

    def said(self) -> str:
        """What it has printed until now."""
        paths = [path for path in dict.fromkeys(self._streams) if path.exists()]
        return "".join(path.read_text(errors="replace") for path in paths)

    def send_signal(self, number: int) -> None:
        """Signal it, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start_module(module: str, *arguments: object, **options: Any) -> Forked:
    """`python -m MODULE ARGUMENTS`; options as for `Forked`."""
    return Forked(_run_module, module, [str(argument) for argument in arguments], **options)


def run_module(
    module: str, *arguments: object, timeout_s: float = 240.0, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """The same to its end."""
    process = start_module(module, *arguments, **options)
    try:
        out, said = process.communicate(timeout_s)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, said)


def server_pids() -> set[int]:
    """The server and the tracker of its resources, which outlive every test."""
    from multiprocessing import forkserver, resource_tracker

    found = forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    return {pid for pid in found if pid is not None}


def _run(
    environment: dict[str, str],
    cwd: str,
    streams: list[str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """Become what a new interpreter would be, then call the function."""
    for number, path in enumerate(streams, start=1):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    tempfile.tempdir = None  # asks the environment again
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as everywhere else
    numpy = importlib.import_module("numpy")
    numpy.random.seed(int.from_bytes(os.urandom(4), "little"))  # Python's own reseeds itself
    if "OMP_NUM_THREADS" in environment:
        importlib.import_module("torch").set_num_threads(int(environment["OMP_NUM_THREADS"]))
    function(*arguments)


def _run_module(module: str, arguments: list[str]) -> None:
    sys.argv = [module, *arguments]
    sys.path.insert(0, os.getcwd())
    runpy.run_module(module, run_name="__main__", alter_sys=True)
