"""The files that a command-line argument names: a folder, a list of files, shards by a pattern.

To shards belongs the list of their classes beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from dinoscale.data.sources.listing import COMPRESSED_TAR
from dinoscale.errors import DataError


def files_of_spec(spec: str) -> tuple[str, Iterable[str]]:
    """The folder of all files that opening `spec` reads, and these files in a fixed order."""
    path = os.path.realpath(os.path.expanduser(spec))
    if os.path.isdir(path):
        return path, _below(path)
    link = os.path.abspath(os.path.expanduser(spec))  # beside which its classes are looked for
    is_file = os.path.isfile(path)
    return os.path.dirname(path), _of_file(path, link) if is_file else _of_pattern(spec)


def _below(folder: str) -> Iterator[str]:
    """All files below a folder, in a fixed order; links to folders are followed."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(
            name for name in folders if os.path.realpath(os.path.join(place, name)) not in seen
        )
        yield from (os.path.join(place, name) for name in sorted(files))


def _of_file(path: str, link: str) -> Iterator[str]:
    """A file and, where it is a list of files, those that it names; see `_beside`."""
    yield path
    yield from _beside([link])
    if path.lower().endswith(".txt") and os.access(path, os.R_OK):
        with open(path, "rb") as lines:
            for line in lines:
                named = os.path.join(os.path.dirname(path), os.fsdecode(line.strip()))
                if os.path.isfile(named):
                    yield named


def _of_pattern(spec: str) -> list[str]:
    """Files of a pattern; none if one is missing, which opening the pattern will report."""
    from dinoscale.data.sources.source import expand_pattern  # takes a second, and few need it

    try:
        paths = [os.path.abspath(path) for path in expand_pattern(os.path.expanduser(spec))]
    except DataError:
        return []
    return [*paths, *_beside(paths)]


def _beside(paths: Iterable[str]) -> Iterator[str]:
    """The lists of classes beside those of some files that are shards."""
    shards = [path for path in paths if path.lower().endswith((".tar", *COMPRESSED_TAR))]
    if shards:
        from dinoscale.data.sources.classes import FILE_NAME  # as slow

        for folder in dict.fromkeys(map(os.path.dirname, shards)):
            listed = os.path.join(folder, FILE_NAME)
            if os.path.isfile(listed):
                yield listed
