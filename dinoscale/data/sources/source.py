"""Where images come from: a folder, tar shards or generated pictures, behind one Protocol."""

import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from dinoscale.data.decoding.decode import RGB, Decoder, Picture
from dinoscale.data.shards.remote import is_remote, shown
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.folder import FolderSource, ListSource
from dinoscale.data.sources.left_out import COMPRESSED, LeftOut
from dinoscale.data.sources.listing import COMPRESSED_TAR, list_folder
from dinoscale.errors import DataError
from dinoscale.runtime.retry import path_exists, with_retries

log = logging.getLogger(__name__)

_UNKNOWN_REMOTE = re.compile(r"(gcs|hf|abfss?|az|s?ftp|file):", re.IGNORECASE)

_MAX_NAMES = 1_000_000  # shards of one brace pattern


class Source(Protocol):
    """N images in a fixed order, picklable to worker processes."""

    def __len__(self) -> int:
        """N."""
        ...

    def path(self, index: int) -> str:
        """Where the image is, for messages."""
        ...

    def picture(self, index: int) -> Picture:
        """The picture; it or its `pixels` raise BadSampleError where it cannot be decoded."""
        ...

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers (N,), -1 where unknown, or None without any."""
        ...

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class number, or None."""
        ...


class StoredSource(Source, Protocol):
    """A source that can tell whether another start of a run has the same images."""

    def identity(self, heartbeat: Callable[[], None] = lambda: None, /) -> str:
        """Digest of the names and sizes of the images in their order, wherever the set lies.

        `heartbeat` is called repeatedly if that takes long.

        Raises:
            DataError: they cannot be read.
        """
        ...


def open_source(
    spec: str,
    decoder: Decoder = RGB,
    heartbeat: Callable[[], None] = lambda: None,
    *,
    num_processes: int | None = None,
) -> StoredSource:
    """Open what a data key of the config names; files are listed now, images read later.

    Names and locations of the images are kept on disk, not in memory: for shards in the cache
    folder, made once; for folders and lists in a temporary file, made at every start.

    Args:
        spec: a folder of images (flat, nested or one subfolder per class), a folder of .tar shards,
            a .tar, a brace pattern (`/data/train-{000..007}.tar`), a glob (`/data/*.tar`), a .txt
            list of images (one path per line, relative to its folder), or `synthetic:...`. `~` at
            the start is the home folder; a comma has no special meaning.
        decoder: decodes its files.
        heartbeat: called repeatedly while files are listed and shards indexed, perhaps for hours.
        num_processes: processes that index many shards; None: one per core.

    Raises:
        DataError: nothing is there, it cannot be read, or it holds no images.
        UnavailableError: the file system failed for about a minute.
    """
    if spec.startswith("synthetic:"):
        from dinoscale.data.sources.synthetic import parse_synthetic  # only where needed

        if decoder.channels != 3:
            raise DataError(f"{spec}: has 3 channels, need {decoder.channels} (data.channels).")
        return parse_synthetic(spec)
    if not spec.strip():
        raise DataError("the path of the images is empty. Name a folder or .tar shards.")
    if is_remote(spec):
        raise DataError(
            f"{shown(spec)}: shards that are streamed can only be trained on, as data.train, and "
            "alone. Copy them to a local or mounted disk."
        )
    if _UNKNOWN_REMOTE.match(spec):
        raise DataError(
            f"{shown(spec)}: cannot be read over the network; https, s3, gs and hdfs can. Copy the "
            "images or shards to a local or mounted disk, or use a command, pipe:COMMAND."
        )
    path = os.path.expanduser(spec)
    with_retries(lambda: path_exists(path), path)  # or the file system fails
    if os.path.isdir(path):
        return _open_folder(path, decoder, heartbeat, num_processes)
    if path.lower().endswith(".txt") and os.path.isfile(path):
        return ListSource(path, decoder, heartbeat)
    paths = [path] if os.path.exists(path) else expand_pattern(path)
    _require_shards(spec, paths)
    return TarSource(paths, decoder, heartbeat, num_processes=num_processes)


def _open_folder(
    path: str, decoder: Decoder, heartbeat: Callable[[], None], num_processes: int | None
) -> StoredSource:
    """A folder of shards holds .tar files and no file that may be an image."""
    listing = list_folder(path, heartbeat)
    shards, compressed = listing.other_files.shards, listing.other_files.compressed
    if len(listing.images) or not (shards or compressed):
        return FolderSource(path, listing, decoder)  # an empty one says what it holds instead
    log.info("%s holds no images but %d .tar shards: reading those", path, len(shards))
    paths = [os.path.join(path, name) for name in shards or compressed]
    source = TarSource(paths, decoder, heartbeat, num_processes=num_processes)
    if shards and compressed:
        unread = LeftOut()
        unread.add(COMPRESSED, compressed[0], len(compressed) * -(-len(source) // len(shards)))
        unread.warn(path)
        source.left_out.merge(unread)
    return source


def _require_shards(spec: str, paths: Sequence[str]) -> None:
    for path in paths:
        if os.path.isdir(path) or not path.lower().endswith((".tar", *COMPRESSED_TAR)):
            raise DataError(
                f"{path} is not a .tar shard{_named_by(spec, path)}. Name a folder of images, a "
                ".txt list of their paths, or tar shards by their names, a brace pattern or a glob."
            )


def _named_by(spec: str, path: str) -> str:
    return "" if path == spec else f" (named by {spec})"


def expand_pattern(spec: str) -> list[str]:
    """Return the files that a brace pattern or glob names.

    Raises:
        DataError: one of them is not there.
    """
    patterns = expand_braces(spec)
    paths: list[str] = []
    missing: list[str] = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True), key=os.fsencode)
        if os.path.exists(pattern):  # a name with brackets in it
            found = [pattern]
        paths += found
        if not found:
            missing.append(pattern)
    if missing:
        raise DataError(_nothing_there(spec, missing, num_patterns=len(patterns)))
    return paths


def expand_braces(spec: str) -> list[str]:
    """What a brace pattern such as `train-{000..099}.tar` names; the spec itself without braces.

    Raises:
        DataError: it is not a pattern, or names too much.
    """
    try:
        if _num_names(spec) > _MAX_NAMES:
            raise ValueError(f"it names more than {_MAX_NAMES} files")
        return list(braceexpand(spec, escape=False))
    except ValueError as error:
        why = str(error).replace(spec, shown(spec))
        raise DataError(f"{shown(spec)}: not a brace pattern ({why}).") from None


def _num_names(spec: str) -> int:
    """A lower bound on the number of names; listing them all could take all memory."""
    total = 1
    for inside in re.findall(r"\{([^{}]*)\}", spec):
        ends = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(\.\..*)?", inside)
        total *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else inside.count(",") + 1
    return total


def _nothing_there(spec: str, missing: Sequence[str], *, num_patterns: int) -> str:
    if num_patterns > 1:
        return (
            f"{spec}: {len(missing)} of {num_patterns} shards are not there, the first is "
            f"{missing[0]}. Correct the pattern or copy the shards there."
        )
    if glob.has_magic(missing[0]):
        return f"{spec}: no file matches this pattern. Correct it or name a folder of images."
    parent = os.path.abspath(missing[0])
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    return (
        f"{spec} does not exist (the nearest folder that does is {parent}). Name a folder of "
        "images or .tar shards."
    )
