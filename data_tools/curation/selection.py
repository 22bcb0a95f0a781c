"""Write chosen images as a list that a training takes, with a record of how they were chosen.

The list has one path per line. `data.train` takes it as it is, alone or in a weighted mixture; an
image that stands in it twice is drawn twice in an epoch. A line for a picture in a tar shard is
`shard.tar::member`: a training reads no such list, but `dinoscale data build-shards` packs it into
shards, which it does read.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.curation.embeddings import Embeddings
from data_tools.journal import Json, require_writable, write_whole
from dinoscale.data.shards.remote import is_remote
from dinoscale.errors import DataError
from dinoscale.runtime.outputs import sha256
from dinoscale.runtime.versions import package_version

FORMAT = "dinoscale selection 1"

_MEMBER = ".tar::"
_AT_ONCE = 2**16  # names in memory
_LOOKED_FOR = 100  # images, before any work


class Places:
    """Where the images of embeddings lie: turns their names into lines of a list.

    Args:
        embeddings: of the images.
        images: folder of the images, if it has moved since they were embedded; None takes the one
            of that time.

    Raises:
        DataError: no list can name the images, or their folder is not there.
    """

    def __init__(self, embeddings: Embeddings, images: str | None) -> None:
        spec = str(embeddings.about["data"]["spec"])
        first = embeddings.names(np.zeros(1, dtype=np.int64))[0]
        if spec.startswith("synthetic:") or is_remote(spec):
            raise DataError(
                f"{embeddings.path}: its images, {spec}, are no files on a disk, and no list can"
                " name them. Write or copy them to a disk, and embed those"
            )
        self.of_shards = _MEMBER in first
        self._root: str | None = None  # of names below a folder
        if images is not None and (self.of_shards or os.path.isabs(first)):
            raise DataError(
                f"--image-root {images}: the names of these images are absolute, such as {first};"
                " the option is for embeddings of a folder"
            )
        if not os.path.isabs(first):
            root = _root(embeddings) if images is None else os.path.expanduser(images)
            root = os.path.abspath(root)
            _require_images(embeddings, root)
            # As `deduplicate` writes it: what lies below `/./` are the classes of `build-shards`.
            classes = embeddings.class_names is not None
            self._root = os.path.join(root, ".") if classes else root

    def line(self, name: str) -> bytes:
        """The line of an image.

        Raises:
            DataError: its name has a line break.
        """
        path = name if self._root is None else os.path.join(self._root, name)
        if "\n" in path or "\r" in path:
            raise DataError(f"{path!r} has a line break in its name; no list can hold it. Rename")
        return os.fsencode(path) + b"\n"


def _root(embeddings: Embeddings) -> str:
    """Folder of the images at the time they were embedded, absolute.

    Raises:
        DataError: only a path relative to the working directory of that time is known.
    """
    of = embeddings.about["data"]
    root = str(of.get("root") or os.path.expanduser(of["spec"]))  # older versions wrote no root
    if not os.path.isabs(root):
        raise DataError(
            f"{embeddings.path}: the folder of its images is known only as {root}, below a folder"
            " that was not written down. Name it with --image-root"
        )
    return root


def _require_images(embeddings: Embeddings, root: str) -> None:
    """Look for some of the images, spread evenly, in a folder."""
    last = len(embeddings) - 1
    rows = np.unique(np.linspace(0, last, min(last + 1, _LOOKED_FOR)).astype(np.int64))
    for name in embeddings.names(rows):
        if not os.path.exists(os.path.join(root, name)):
            raise DataError(
                f"{name} of {embeddings.path} is not in {root}. Name the folder of the images with"
                " --image-root"
            )


def require_lines(embeddings: Embeddings, images: str | None) -> None:
    """Find out before the work whether a list can hold each of the images; reads all names.

    All ranks call it, and the first one reads: others wait without a collective, which would time
    out where there are very many names.

    Args:
        embeddings: of the images.
        images: as `Places` takes it.

    Raises:
        DataError: it cannot.
    """
    # Not on top: it imports torch, which reading a folder does not need.
    from dinoscale.runtime.opening import on_first_rank

    def read(_: object) -> None:
        places = Places(embeddings, images)
        numbers = np.arange(len(embeddings), dtype=np.int64)
        for _line in _lines(places, embeddings, numbers, None):
            pass

    on_first_rank(read)


def require_list(path: Path, *read: Embeddings) -> None:
    """Find out before the work whether a selection can be written under a name.

    Args:
        path: of the list.
        read: embeddings that the work reads; images of each may have been named by a list, too.

    Raises:
        DataError: a training would not take it for a list, or it cannot be written.
        OutputError: something else is there, or a list that named images of these.
    """
    if path.suffix != ".txt":
        raise DataError(f"{path}: data.train takes a list by its ending, .txt: add that")
    for one in read:
        require_writable(path, source=os.path.expanduser(one.about["data"]["spec"]))
    require_writable(record_of(path))


def record_of(path: Path) -> Path:
    """The JSON beside a list."""
    return path.with_suffix(".json")


def write_selection(
    path: Path,
    embeddings: Embeddings,
    numbers: NDArray[np.int64],
    *,
    counts: NDArray[np.int64] | None = None,
    about: Mapping[str, object],
    images: str | None = None,
) -> Json:
    """Write a list of chosen images, then beside it a JSON with its sum and all it depends on.

    Args:
        path: of the list, NAME.txt; the JSON is NAME.json.
        embeddings: the images by their rows.
        numbers: rows of the chosen images, ascending, (n,).
        counts: how often each stands in the list, (n,), at least 1; None: once.
        about: command, settings, seed and numbers before and after, JSON.
        images: as `Places` takes it.

    Returns:
        The JSON, with the list's name and lines.

    Raises:
        DataError: nothing is chosen, no list can name the images, or a file cannot be written.
        OutputError: something else is there.
    """
    if not len(numbers):
        raise DataError(f"{path}: no image is chosen, and a training takes no empty list")
    places = Places(embeddings, images)
    write_whole(path, _lines(places, embeddings, numbers, counts))
    record: Json = {
        "format": FORMAT,
        "list": path.name,
        "sha256": sha256(path),
        "images": len(numbers),
        "lines": len(numbers) if counts is None else int(counts.sum()),
        "train_on": _use(path, of_shards=places.of_shards),
        "embeddings": {
            "path": str(embeddings.path),
            "digest": embeddings.digest,
            "images": len(embeddings),
            "features": [*embeddings.features],
            "normalized": embeddings.normalized,
            "weights": embeddings.about["weights"],
            "data": embeddings.about["data"]["spec"],
        },
        "version": package_version("dinoscale"),
        **about,
    }
    write_whole(record_of(path), json.dumps(record, indent=1).encode() + b"\n")
    return record


def _lines(
    places: Places,
    embeddings: Embeddings,
    numbers: NDArray[np.int64],
    counts: NDArray[np.int64] | None,
) -> Iterator[bytes]:
    for start in range(0, len(numbers), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        lines = map(places.line, embeddings.names(numbers[some]))
        if counts is None:
            yield b"".join(lines)
        else:
            often = counts[some].tolist()
            yield b"".join(line * count for line, count in zip(lines, often, strict=True))


def _use(path: Path, *, of_shards: bool) -> str:
    """How a training gets at the selection, to be pasted into a shell."""
    listed = shlex.quote(str(path))
    if of_shards:
        folder = shlex.quote(str(path.with_suffix("")))
        return f"dinoscale data build-shards {listed} {folder}, then data.train={folder}"
    return f"data.train={listed}"
