"""The files below a folder: its images in a fixed order, and what is left out and why."""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar

from tqdm import tqdm

from dinoscale.data.shards.row_table import RowTable
from dinoscale.data.sources.image_files import NAMES_PER_HEARTBEAT, write_names
from dinoscale.data.sources.left_out import DEAD_LINK, LOOP, LeftOut, is_junk_file, is_junk_folder
from dinoscale.errors import DataError, UnavailableError
from dinoscale.runtime.retry import RetryBudget, is_permanent, path_exists, read_error

log = logging.getLogger(__name__)
T = TypeVar("T")

ARRAY = ".npy"
COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

# Unknown or missing extensions are tried: pictures named by a hash have none.
_NOT_IMAGE_EXTENSIONS = {
    ".7z", ".avi", ".bin", ".bz2", ".ckpt", ".cls", ".csv", ".db", ".gz", ".h5", ".htm",
    ".html", ".idx", ".ini", ".ipynb", ".json", ".jsonl", ".lmdb", ".lock", ".log", ".md",
    ".md5", ".mkv", ".mov", ".mp4", ".npy", ".npz", ".parquet", ".partial", ".pdf", ".pkl", ".pt",
    ".pth", ".py", ".rar", ".rst", ".safetensors", ".sh", ".sha256", ".sqlite", ".state", ".tar",
    ".tbz2", ".tfrecord", ".tgz", ".toml", ".tsv", ".txt", ".txz", ".wav", ".xml", ".xz", ".yaml",
    ".yml", ".zip", ".zst",
}  # fmt: skip

_PROGRESS_DELAY_S = 2.0  # shorter listings show no progress


@dataclass
class OtherFiles:
    """What is below a folder besides its images.

    Attributes:
        num_folders: subfolders at all depths.
        by_extension: extension, or name without one -> number of files that are not images.
        shards: those of them that end in `.tar`, relative to the folder.
        compressed: those that are compressed tars.
        links: links that lead nowhere, or to a folder that contains them.
    """

    num_folders: int = 0
    by_extension: Counter[str] = field(default_factory=Counter)
    shards: list[str] = field(default_factory=list)
    compressed: list[str] = field(default_factory=list)
    links: LeftOut = field(default_factory=LeftOut)


@dataclass(frozen=True)
class Listing:
    """Images below a folder, as a table of relative paths in byte order, and all other files."""

    images: RowTable
    other_files: OtherFiles


class _Kind(IntEnum):
    FOLDER, LINKED_FOLDER, FILE, DANGLING = range(4)


_Entry = tuple[bytes, _Kind]  # its name, with a `/` behind it for a folder


def list_folder(root: str, heartbeat: Callable[[], None] = lambda: None) -> Listing:
    """List all files below `root`, following links to files and folders.

    The order is the same on every machine. Memory is bounded by the largest single folders.

    Args:
        root: the folder.
        heartbeat: called repeatedly meanwhile.

    Raises:
        DataError: a folder cannot be read, or the names cannot be kept in a temporary file.
        UnavailableError: the file system failed for about a minute.
    """
    log.info("listing the files in %s", root)
    listing = _listed(root, _may_be_image, heartbeat)
    other_files = listing.other_files
    alone = not (len(listing.images) or other_files.shards or other_files.compressed)
    if (
        alone and other_files.by_extension[ARRAY]
    ):  # beside pictures, arrays are features or labels of them
        return _listed(root, _is_array, heartbeat)
    return listing


def _listed(root: str, is_image: Callable[[str], bool], heartbeat: Callable[[], None]) -> Listing:
    other_files = OtherFiles()
    images = _images(root, other_files, is_image, heartbeat)
    return Listing(write_names(images, of=root), other_files)


def _images(
    root: str,
    other_files: OtherFiles,
    is_image: Callable[[str], bool],
    heartbeat: Callable[[], None],
) -> Iterator[str]:
    """Images in the order of their paths; counts everything else."""
    for number, (name, kind) in enumerate(_walk(root)):
        if number % NAMES_PER_HEARTBEAT == 0:
            heartbeat()
        if kind is _Kind.FOLDER:
            other_files.num_folders += 1
        elif kind is _Kind.LINKED_FOLDER:
            other_files.links.add(LOOP, name)
        elif kind is _Kind.DANGLING:
            if is_image(name.rpartition("/")[2]):
                other_files.links.add(DEAD_LINK, name)
        elif is_image(name.rpartition("/")[2]):
            yield name
        else:
            _count_other_file(name, other_files)


def class_folders(root: str) -> list[str]:
    """First-level subfolders with an image at any depth; those that cannot be listed are skipped.

    Raises:
        UnavailableError: the file system failed for about a minute.
    """
    names = [os.fsdecode(name[:-1]) for name, _ in _entries(root, "") if name.endswith(b"/")]
    return [name for name in names if _holds_image(os.path.join(root, name))]


def _holds_image(folder: str) -> bool:
    try:
        return any(
            kind is _Kind.FILE and _may_be_image(name.rpartition("/")[2])
            for name, kind in _walk(folder)
        )
    except UnavailableError:
        raise
    except DataError:
        return False


def _count_other_file(name: str, other_files: OtherFiles) -> None:
    lower, base = name.lower(), name.rpartition("/")[2]
    kind = "junk" if is_junk_file(base) else os.path.splitext(lower)[1]
    other_files.by_extension[kind or base] += 1
    if kind == "junk":
        return
    if lower.endswith(".tar"):
        other_files.shards.append(name)
    elif lower.endswith(COMPRESSED_TAR):
        other_files.compressed.append(name)


def _walk(root: str) -> Iterator[tuple[str, _Kind]]:
    """Yield folders, files, dangling links and links to a folder above them; depth first.

    Folders are sorted as `name/` among the files beside them, which is the byte order of the paths.
    """
    bar = tqdm(
        desc="listing", unit=" files", delay=_PROGRESS_DELAY_S, disable=None, file=sys.stderr
    )
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
    return _with_retries(lambda: sorted(_listed_entries(path)), path)


def _listed_entries(path: str) -> Iterator[_Entry]:
    with os.scandir(path) as entries:
        for entry in entries:
            kind = _kind(entry)
            if kind is not None:
                slash = b"/" if kind in (_Kind.FOLDER, _Kind.LINKED_FOLDER) else b""
                yield os.fsencode(entry.name) + slash, kind


def _kind(entry: os.DirEntry[str]) -> _Kind | None:
    """None for folders of tools, pipes, sockets and devices, which are left out."""
    link = entry.is_symlink()
    if link and not path_exists(entry.path):
        return _Kind.DANGLING
    if entry.is_dir():
        if is_junk_folder(entry.name):
            return None
        return _Kind.LINKED_FOLDER if link else _Kind.FOLDER
    return _Kind.FILE if entry.is_file() else None


def _contains(root: str, link: str, prefixes: Sequence[str]) -> bool:
    """Whether a link leads to one of the folders it lies in; without links there are no loops."""
    paths = [os.path.join(root, name) for name in (link, *prefixes)]
    target, *above = _with_retries(lambda: [os.stat(path) for path in paths], paths[0])
    return any(os.path.samestat(target, status) for status in above)


def _with_retries(read: Callable[[], T], path: str) -> T:
    """Read with retries; raises DataError, also if a file system fails for about a minute."""
    try:
        return RetryBudget().read(read, path)
    except OSError as error:
        if not is_permanent(error):
            raise read_error(f"the folder {path}", error) from error
        raise DataError(
            f"cannot list the folder {path}: {error.strerror}. Make it readable for this user, or"
            " move it out of the data."
        ) from error


def _may_be_image(name: str) -> bool:
    return not is_junk_file(name) and not is_known_not_image(name)


def is_known_not_image(name: str) -> bool:
    """Whether the extension says that a file is not an image; an unknown one does not."""
    return os.path.splitext(name.lower())[1] in _NOT_IMAGE_EXTENSIONS


def _is_array(name: str) -> bool:
    return not is_junk_file(name) and name.lower().endswith(ARRAY)
