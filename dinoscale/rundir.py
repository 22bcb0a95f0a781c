"""The run directory: what is written before the first step, and what it says about the code."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dinoscale.config import RunConfig, dump_config
from dinoscale.engine.student import Student
from dinoscale.errors import DinoscaleError

_PACKAGES = ("dinoscale", "torch", "deepspeed", "timm", "numpy", "pillow", "webdataset")


def prepare(config: RunConfig, student: Student) -> Path:
    """Create the run directory; write config.yaml, deepspeed.json and versions.json into it.

    Raises:
        DinoscaleError: the directory cannot be written.
    """
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(config))
        (run_dir / "deepspeed.json").write_text(
            json.dumps(student.deepspeed_config, indent=1) + "\n"
        )
        (run_dir / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
    except OSError as error:
        raise DinoscaleError(
            f"run_dir: cannot write to {run_dir}: {error.strerror or error};"
            " choose another with run_dir=PATH"
        ) from error
    return run_dir


def versions() -> dict[str, str | None]:
    """Python, the libraries that change numbers, and the commit of the code (None if unknown)."""
    installed = {package: _version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **installed, "commit": _commit()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this package is imported from, "-dirty" if it was edited."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
