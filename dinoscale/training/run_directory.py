"""The run directory: its lock, and the files written before the first step."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from dinoscale.config import RunConfig, dump_config
from dinoscale.errors import DinoscaleError, OutputError
from dinoscale.runtime.locks import try_lock
from dinoscale.runtime.outputs import replace_text
from dinoscale.runtime.versions import versions

log = logging.getLogger(__name__)

CONFIG = "config.yaml"  # training from it repeats the run
VERSIONS = "versions.json"  # marks a run directory: each has one
_LOCK_WAIT_S = 60.0  # processes of a killed run need some seconds to end


def lock(run_dir: Path) -> IO[str]:
    """Create the run directory, and lock out other runs while the returned file is open.

    The lock ends with the process, however that ends.

    Raises:
        DinoscaleError: the directory cannot be written, or another run uses it.
    """
    end = time.monotonic() + _LOCK_WAIT_S
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        while (file := try_lock(run_dir / ".lock")) is None:
            if time.monotonic() > end:
                raise DinoscaleError(
                    f"run_dir: another run is using {run_dir}; wait for it, end it, or choose"
                    " another directory with run_dir=PATH"
                )
            log.warning("another run is using %s; waiting for it to end", run_dir)
            time.sleep(2.0)
    except OSError as error:
        raise _cannot_write(run_dir, error) from error
    return file


def prepare(config: RunConfig, deepspeed: Mapping[str, Any] | None = None) -> Path:
    """Write config.yaml, deepspeed.json and versions.json into the run directory.

    Args:
        config: of the run.
        deepspeed: "student" and "teacher" -> DeepSpeed's configuration; null if none is used. None
            for a run of several phases, each of which has its own.

    Raises:
        DinoscaleError: the directory cannot be written.
        OutputError: it has a config.yaml that no run wrote.
    """
    run_dir = Path(config.run_dir)
    _refuse_others(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(
            run_dir / VERSIONS, json.dumps(versions(), indent=1) + "\n"
        )  # marks it as ours
        replace_text(run_dir / CONFIG, dump_config(config))
        if deepspeed is not None:
            replace_text(run_dir / "deepspeed.json", json.dumps(deepspeed, indent=1) + "\n")
    except OSError as error:
        raise _cannot_write(run_dir, error) from error
    return run_dir


def _refuse_others(run_dir: Path) -> None:
    """Refuse a folder with a config.yaml of something else, which would be overwritten."""
    theirs = run_dir / CONFIG
    if theirs.exists() and not (run_dir / VERSIONS).exists():
        raise OutputError(
            f"run_dir: {theirs} belongs to no run and would be overwritten; choose another"
            " directory with run_dir=PATH"
        )


def _cannot_write(run_dir: Path, error: OSError) -> DinoscaleError:
    return DinoscaleError(
        f"run_dir: cannot write to {run_dir}: {error.strerror or error};"
        " choose another with run_dir=PATH"
    )
