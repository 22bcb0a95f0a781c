"""Fingerprints of what a metric was measured on, so that values on other images never mix."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise

from dinoscale.data.sources.spec_files import files_of_spec
from dinoscale.runtime.fingerprint import Fingerprint, differences, files_fingerprint, fingerprint
from dinoscale.runtime.versions import versions

_OUTPUT_OPTIONS = ("--log", "--out")
_FIRST_OPTION = 3  # words after `dinoscale` before the options: evaluate, task, weights


def measurement_fingerprint(line: str, words: Sequence[str]) -> Fingerprint:
    """Fingerprint of a measurement: its images, its line and the code.

    Args:
        line: the metric's line in the sweep's file.
        words: words of the command; empty for what the training itself measures.

    Raises:
        UnavailableError: the images are on an unavailable file system.
    """
    return _cached_fingerprint(line, tuple(words[_FIRST_OPTION:]))


@functools.cache  # all runs are measured on the same images
def _cached_fingerprint(line: str, options: tuple[str, ...]) -> Fingerprint:
    images = {}
    for name in filter(_is_input, _read(options)):
        folder, files = files_of_spec(name)
        found = files_fingerprint(folder, files)
        if found["number"]:
            images[name] = found
    return fingerprint(input=images, command={"line": line}, code=versions())


def _read(options: Sequence[str]) -> Iterator[str]:
    """Words that may name inputs; outputs, which every run writes anew, are skipped."""
    for before, option in pairwise(("", *options)):
        flag, _, value = option.partition("=")
        if not {before, flag} & set(_OUTPUT_OPTIONS):
            yield value if flag.startswith("--") else option


def _is_input(word: str) -> bool:
    """Whether a word names an existing file or folder, or may be a pattern."""
    return bool(word) and (
        os.path.exists(os.path.expanduser(word)) or bool(set("{*?[") & set(word))
    )


def changed_input(kept: object, now: Fingerprint) -> list[str]:
    """The parts of the images and the line that changed; empty where nothing is known.

    Changed code does not count: the report names differing versions. Neither do images that cannot
    be seen from this machine, or could not be seen from that of the measurement.
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


def _images(found: Fingerprint) -> dict[str, object]:
    images = found["input"]
    return images if isinstance(images, dict) else {}
