"""The run directory: what is written before the first step, and what it says about the code."""

import fcntl
import json
import logging
import time
from pathlib import Path
from typing import IO

from dinoscale.config import RunConfig, dump_config
from dinoscale.engine.student import Student
from dinoscale.errors import DinoscaleError
from dinoscale.versions import versions

log = logging.getLogger(__name__)

_LOCK_WAIT_S = 60.0  # processes of a run that was killed need some seconds to go


def lock(run_dir: Path) -> IO[str]:
    """Create the run directory and keep other runs out of it while the result is open.

    The lock goes with the process, however it ends.

    Raises:
        DinoscaleError: the directory cannot be written, or another run uses it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a+")
    except OSError as error:
        raise _cannot_write(run_dir, error) from error
    end = time.monotonic() + _LOCK_WAIT_S
    while not _locked(file):
        if time.monotonic() > end:
            raise DinoscaleError(
                f"run_dir: another run is using {run_dir}; wait for it, end it, or choose another"
                " directory with run_dir=PATH"
            )
        log.warning("another run is using %s; waiting for it to end", run_dir)
        time.sleep(2.0)
    return file


def _locked(file: IO[str]) -> bool:
    """Whether the file could be locked, or there are no locks on its file system."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        log.warning("cannot lock %s (%s): start no second run there", file.name, error)
    return True


def prepare(config: RunConfig, student: Student) -> Path:
    """Write config.yaml, deepspeed.json and versions.json into the run directory.

    Raises:
        DinoscaleError: the directory cannot be written.
    """
    run_dir = Path(config.run_dir)
    try:
        _replace(run_dir / "config.yaml", dump_config(config))
        _replace(run_dir / "deepspeed.json", json.dumps(student.deepspeed_config, indent=1) + "\n")
        _replace(run_dir / "versions.json", json.dumps(versions(), indent=1) + "\n")
    except OSError as error:
        raise _cannot_write(run_dir, error) from error
    return run_dir


def _replace(path: Path, text: str) -> None:
    """Write a file so that a full disk leaves the one from before."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    beside.replace(path)


def _cannot_write(run_dir: Path, error: OSError) -> DinoscaleError:
    return DinoscaleError(
        f"run_dir: cannot write to {run_dir}: {error.strerror or error};"
        " choose another with run_dir=PATH"
    )
