"""Versions of whatever can change a number: Python, libraries, our own commit."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("dinoscale", "torch", "deepspeed", "timm", "numpy", "pillow", "webdataset")


def versions() -> dict[str, str | None]:
    """Python, the libraries that change numbers, and the commit of the code (None if unknown)."""
    installed = {package: package_version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **installed, "commit": commit()}


def package_version(package: str) -> str | None:
    """Of an installed package, None if it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of the checkout this package is imported from, "-dirty" if it was edited."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
