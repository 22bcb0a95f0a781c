"""What a metric was measured on, so that values of other images are never taken for the same."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from dinoscale.fingerprint import Fingerprint, differences, files_print, fingerprint
from dinoscale.versions import versions

_FIRST_OPTION = 3  # of the words after `dinoscale`: evaluate, the task and the weights


def print_of(line: str, words: Sequence[str]) -> Fingerprint:
    """Fingerprint of a measurement: its images, its line and the code.

    Args:
        line: of the sweep's file.
        words: of the command; none for what the training itself measures.

    Raises:
        UnavailableError: the images are on a file system that fails.
    """
    return _print_of(line, tuple(words[_FIRST_OPTION:]))


@functools.cache  # the images of all runs are the same
def _print_of(line: str, options: tuple[str, ...]) -> Fingerprint:
    images = {}
    for option in options:
        name = option.partition("=")[2] if option.startswith("--") else option
        path = Path(name)
        if name and path.exists():
            files = sorted(str(file) for file in path.rglob("*")) if path.is_dir() else [name]
            images[name] = files_print(name, files)
    return fingerprint(input=images, command={"line": line}, code=versions())


def changed_input(kept: object, now: Fingerprint) -> list[str]:
    """What of the images and the line is not as it was; of nothing known nothing.

    Other code is no other measurement: the report names the versions that differ. Images that
    cannot be seen from here, or could not from there, tell nothing either.
    """
    if not isinstance(kept, dict) or not kept:
        return []
    changed = differences(kept, now)
    both = set(kept.get("input", {})) & set(_images(now))
    return [
        name
        for name in changed
        if name == "command.line" or any(name.startswith(f"input.{image}") for image in both)
    ]


def _images(print_: Fingerprint) -> dict[str, object]:
    images = print_["input"]
    return images if isinstance(images, dict) else {}
