"""What lies below a folder: its images in a fixed order, and what is left out and why."""

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from tqdm import tqdm

from dinoscale.data.files import write_names
from dinoscale.data.index import Index
from dinoscale.errors import DataError

log = logging.getLogger(__name__)

COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

# Files and folders that file managers, notebooks and version control leave behind.
_JUNK_FOLDERS = {".git", ".ipynb_checkpoints", ".svn", "@eadir", "__macosx"}
_JUNK_FILES = {".ds_store", ".gitattributes", ".gitignore", ".gitkeep", "desktop.ini", "thumbs.db"}
# Unknown or missing extensions are tried: pictures named by a hash have none.
_NOT_IMAGE_EXTENSIONS = {
    ".7z", ".avi", ".bin", ".bz2", ".ckpt", ".cls", ".csv", ".db", ".gz", ".h5", ".htm",
    ".html", ".idx", ".ini", ".ipynb", ".json", ".jsonl", ".lmdb", ".lock", ".log", ".md",
    ".md5", ".mkv", ".mov", ".mp4", ".npy", ".npz", ".parquet", ".partial", ".pdf", ".pkl", ".pt",
    ".pth", ".py", ".rar", ".rst", ".safetensors", ".sh", ".sha256", ".sqlite", ".state", ".tar",
    ".tbz2", ".tfrecord", ".tgz", ".toml", ".tsv", ".txt", ".txz", ".wav", ".xml", ".xz", ".yaml",
    ".yml", ".zip", ".zst",
}  # fmt: skip

_QUIET_S = 2.0  # shorter listings show no progress


@dataclass
class Links:
    """Links that were not followed: how many, and the first of them."""

    count: int = 0
    first: str = ""

    def add(self, name: str) -> None:
        """Count one more."""
        self.first = self.first or name
        self.count += 1


@dataclass
class LeftOut:
    """What lies below a folder beside its images.

    Attributes:
        num_folders: subfolders at all depths.
        others: extension, or name without one -> how many files are no images, by their names.
        shards: those of them that end in `.tar`, relative to the folder.
        compressed: those that are compressed tars.
        dangling: links that lead nowhere.
        loops: links to a folder that contains them.
    """

    num_folders: int = 0
    others: Counter[str] = field(default_factory=Counter)
    shards: list[str] = field(default_factory=list)
    compressed: list[str] = field(default_factory=list)
    dangling: Links = field(default_factory=Links)
    loops: Links = field(default_factory=Links)


@dataclass(frozen=True)
class Listing:
    """Images below a folder, on disk, as paths relative to it in the order of their bytes."""

    images: Index
    left_out: LeftOut


class _Kind(IntEnum):
    FOLDER, LINKED_FOLDER, FILE, DANGLING = range(4)


_Entry = tuple[bytes, _Kind]  # its name, with a `/` behind it for a folder


def list_folder(root: str) -> Listing:
    """List all files below `root`, following links to files and folders.

    The order is the same on every machine. Memory is bounded by the largest single folders.

    Raises:
        DataError: a folder cannot be read, or the names cannot be kept in a temporary file.
    """
    log.info("listing the files in %s", root)
    left_out = LeftOut()
    return Listing(write_names(_images(root, left_out), of=root), left_out)


def _images(root: str, left_out: LeftOut) -> Iterator[str]:
    """Images in the order of their paths; counts everything else."""
    for name, kind in _walk(root):
        if kind is _Kind.FOLDER:
            left_out.num_folders += 1
        elif kind is _Kind.LINKED_FOLDER:
            left_out.loops.add(name)
        elif kind is _Kind.DANGLING:
            left_out.dangling.add(name)
        elif _may_be_image(name.rpartition("/")[2]):
            yield name
        else:
            left_out.others[os.path.splitext(name)[1] or name.rpartition("/")[2]] += 1
            lower = name.lower()
            if lower.endswith(".tar"):
                left_out.shards.append(name)
            elif lower.endswith(COMPRESSED_TAR):
                left_out.compressed.append(name)


def _walk(root: str) -> Iterator[tuple[str, _Kind]]:
    """Folders, files, links that lead nowhere, linked folders that contain their link; depth first.

    With the folders of a folder sorted as `name/` among its files, that is the order of the paths.
    """
    bar = tqdm(desc="listing", unit=" files", delay=_QUIET_S, disable=None, file=sys.stderr)
    pending: list[tuple[str, Iterator[_Entry]]] = [("", iter(_entries(root, "")))]
    with bar:
        while pending:
            prefix, entries = pending[-1]
            entry = next(entries, None)
            if entry is None:
                pending.pop()
                continue
            bar.update()
            name, kind = prefix + os.fsdecode(entry[0]), entry[1]
            if kind is _Kind.FOLDER or (
                kind is _Kind.LINKED_FOLDER and not _contains(root, name, [p for p, _ in pending])
            ):
                pending.append((name, iter(_entries(root, name))))
                kind = _Kind.FOLDER
            yield name.rstrip("/"), kind


def _entries(root: str, prefix: str) -> list[_Entry]:
    """What a folder holds, in the order of the paths below it."""
    path = os.path.join(root, prefix)
    found = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                kind = _kind(entry)
                if kind is not None:
                    slash = b"/" if kind in (_Kind.FOLDER, _Kind.LINKED_FOLDER) else b""
                    found.append((os.fsencode(entry.name) + slash, kind))
    except OSError as error:
        raise _unlistable(path, error) from error
    found.sort()
    return found


def _kind(entry: os.DirEntry[str]) -> _Kind | None:
    """None is left out: folders of tools, pipes, sockets, devices."""
    link = entry.is_symlink()
    if link and not os.path.exists(entry.path):
        return _Kind.DANGLING
    if entry.is_dir():
        if entry.name.lower() in _JUNK_FOLDERS:
            return None
        return _Kind.LINKED_FOLDER if link else _Kind.FOLDER
    return _Kind.FILE if entry.is_file() else None


def _contains(root: str, link: str, prefixes: Sequence[str]) -> bool:
    """Whether a link leads to one of the folders it lies in; without links there are no loops."""
    try:
        target = os.stat(os.path.join(root, link))
        above = [os.stat(os.path.join(root, prefix)) for prefix in prefixes]
    except OSError as error:
        raise _unlistable(os.path.join(root, link), error) from error
    return any(os.path.samestat(target, status) for status in above)


def _unlistable(path: str, error: OSError) -> DataError:
    return DataError(
        f"cannot list the folder {path}: {error.strerror}. Make it readable for this user, or move "
        "it out of the data."
    )


def _may_be_image(name: str) -> bool:
    lower = name.lower()
    return lower not in _JUNK_FILES and os.path.splitext(lower)[1] not in _NOT_IMAGE_EXTENSIONS
