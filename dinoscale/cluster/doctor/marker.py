"""A marker file that one process writes and others look for, to test a shared directory."""

import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SEEN_WITHIN_S = 10.0  # network file systems keep old listings for seconds


@dataclass(frozen=True)
class Marker:
    """The marker file: its folder, name and content, or the error of writing it."""

    run_dir: str
    name: str
    token: str
    error: str | None


@dataclass(frozen=True)
class RunDirFacts:
    """What one process found in its run_dir.

    Attributes:
        run_dir: absolute path on its node.
        seen: whether the marker was there.
        error: why it could not write a file of its own, or None.
    """

    run_dir: str
    seen: bool
    error: str | None


def write_marker(path: Path, made: list[Path]) -> Marker:
    """Write a marker file; appends the directories that it creates to `made`, deepest last."""
    marker = Marker(str(path), f".doctor_{secrets.token_hex(8)}", secrets.token_hex(16), None)
    try:
        for folder in [*reversed(path.parents), path]:
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        (path / marker.name).write_text(marker.token)
    except OSError as error:
        return Marker(str(path), marker.name, marker.token, error.strerror or str(error))
    return marker


def look_for(path: Path, marker: Marker, *, own: str) -> RunDirFacts:
    """Wait some seconds for the marker, and write a file beside it, named by `own`."""
    end = time.monotonic() + _SEEN_WITHIN_S
    while not (seen := _reads(path / marker.name, marker.token)) and time.monotonic() < end:
        with suppress(OSError):
            os.listdir(path)  # makes a network file system ask the server again
        time.sleep(0.1)
    error = None
    if seen:
        beside = path / f"{marker.name}_{own}"
        try:
            beside.write_text(marker.token)
            beside.unlink()
        except OSError as caught:
            error = caught.strerror or str(caught)
    return RunDirFacts(str(path), seen, error)


def _reads(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except (OSError, UnicodeDecodeError):
        return False


def remove_marker(path: Path, marker: Marker | None, made: list[Path]) -> None:
    """Remove the marker, and the directories that were made for it."""
    if marker is None:
        return
    with suppress(OSError):
        (path / marker.name).unlink()
    for folder in reversed(made):
        with suppress(OSError):  # not empty: another process uses it now
            folder.rmdir()
