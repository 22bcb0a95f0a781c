"""What a metric was measured on, so that values of other images are never taken for the same."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise

from dinoscale.data.sources.spec_files import files_behind
from dinoscale.runtime.fingerprint import Fingerprint, differences, files_fingerprint, fingerprint
from dinoscale.runtime.versions import versions

_WRITTEN = ("--log", "--out")  # options
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
    for name in filter(_is_input, _read(options)):
        folder, files = files_behind(name)
        found = files_fingerprint(folder, files)
        if found["number"]:
            images[name] = found
    return fingerprint(input=images, command={"line": line}, code=versions())


def _read(options: Sequence[str]) -> Iterator[str]:
    """Words that may name what is read; what every run writes anew is no input."""
    for before, option in pairwise(("", *options)):
        flag, _, value = option.partition("=")
        if not {before, flag} & set(_WRITTEN):
            yield value if flag.startswith("--") else option


def _is_input(word: str) -> bool:
    """Whether it names what is there, or may be the pattern of it."""
    return bool(word) and (
        os.path.exists(os.path.expanduser(word)) or bool(set("{*?[") & set(word))
    )


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
