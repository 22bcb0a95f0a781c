"""A folder of images, flat or nested: every file counts unless its name says it is no image."""

import logging
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoscale.data.decode import RGB, BadSampleError, Decoder, Picture
from dinoscale.data.names import PackedNames
from dinoscale.errors import DataError

log = logging.getLogger(__name__)

# Files and folders that file managers, notebooks and version control leave behind.
_JUNK_FOLDERS = {".git", ".ipynb_checkpoints", ".svn", "@eadir", "__macosx"}
_JUNK_FILES = {".ds_store", ".gitattributes", ".gitignore", ".gitkeep", "desktop.ini", "thumbs.db"}
# Unknown or missing extensions are tried: pictures named by a hash have none.
_NOT_IMAGE_EXTENSIONS = {
    ".7z", ".avi", ".bin", ".bz2", ".ckpt", ".cls", ".csv", ".db", ".gz", ".h5", ".htm",
    ".html", ".idx", ".ini", ".ipynb", ".json", ".jsonl", ".lmdb", ".lock", ".log", ".md",
    ".md5", ".mkv", ".mov", ".mp4", ".npy", ".npz", ".parquet", ".pdf", ".pkl", ".pt", ".pth",
    ".py", ".rar", ".rst", ".safetensors", ".sh", ".sha256", ".sqlite", ".tar", ".tbz2",
    ".tfrecord", ".tgz", ".toml", ".tsv", ".txt", ".txz", ".wav", ".xml", ".xz", ".yaml",
    ".yml", ".zip", ".zst",
}  # fmt: skip


@dataclass
class Listing:
    """What lies below a folder, as paths relative to it with `/`, each list sorted by bytes.

    Attributes:
        images: files that are taken for images.
        others: files that are not, by their names.
        dangling: links that lead nowhere.
        loops: links to a folder that contains them.
    """

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)

    def sort(self) -> None:
        """The same order on every machine, whatever its file system and locale."""
        for names in (self.images, self.others, self.dangling, self.loops):
            names.sort(key=os.fsencode)


def list_folder(root: str) -> Listing:
    """List all files below `root`, following links to files and folders.

    Raises:
        DataError: a folder cannot be read.
    """
    listing = Listing()
    # Relative folder ending in "/", and the identities of the folders from the root down to it.
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identity(root),))]
    while pending:
        prefix, above = pending.pop()
        for entry in _entries(root, prefix):
            name = prefix + entry.name
            if not _exists(entry):
                listing.dangling.append(name)
            elif entry.is_dir():
                if entry.name.lower() in _JUNK_FOLDERS:
                    continue
                identity = _identity(entry.path)
                if identity in above:
                    listing.loops.append(name)
                else:
                    pending.append((name + "/", (*above, identity)))
            elif entry.is_file():  # not a pipe, socket or device
                (listing.images if _may_be_image(entry.name) else listing.others).append(name)
    listing.sort()
    return listing


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _entries(root: str, prefix: str) -> list[os.DirEntry[str]]:
    path = os.path.join(root, prefix)
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"cannot list the folder {path}: {error.strerror}. Make it readable for this user."
        ) from error


def _exists(entry: os.DirEntry[str]) -> bool:
    return not entry.is_symlink() or os.path.exists(entry.path)


def _may_be_image(name: str) -> bool:
    lower = name.lower()
    return lower not in _JUNK_FILES and os.path.splitext(lower)[1] not in _NOT_IMAGE_EXTENSIONS


class FolderSource:
    """Images of a folder and all its subfolders, in the byte order of their relative paths.

    `.npy` files are images where there are no others, neither pictures nor shards.
    Where every image lies in a subfolder, the first-level subfolder is its class.

    Args:
        root: the folder.
        listing: of the folder; read now if not given.
        decoder: what the pixels of a file become.

    Raises:
        DataError: it does not exist, is no folder, cannot be read, or holds no images.
    """

    def __init__(self, root: str, listing: Listing | None = None, decoder: Decoder = RGB):
        self._root = os.path.abspath(root)
        self._decoder = decoder
        if not os.path.isdir(self._root):
            raise DataError(f"{root} is not a folder. Name the folder that holds the images.")
        listing = listing or list_folder(self._root)
        if not listing.images:  # beside pictures, arrays are features or labels of them
            arrays = [name for name in listing.others if _is_array(name)]
            others = [name for name in listing.others if not _is_array(name)]
            listing = replace(listing, images=arrays, others=others)
        if not listing.images:
            raise DataError(_no_images(root, listing))
        _report(root, listing)
        self._names = PackedNames(listing.images)

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> str:
        """Absolute path of an image."""
        return os.path.join(self._root, self._names[index])

    def picture(self, index: int) -> Picture:
        """Read an image.

        Raises:
            BadSampleError: it cannot be read or decoded.
        """
        path = self.path(index)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BadSampleError(path, f"cannot be read: {error.strerror}") from None
        return self._decoder.open(data, path)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers (N,), or None where images lie outside any subfolder."""
        return self._classes[0]

    @property
    def class_names(self) -> list[str] | None:
        """Names of the first-level subfolders with images, sorted, or None."""
        return self._classes[1]

    @cached_property
    def _classes(self) -> tuple[NDArray[np.int64] | None, list[str] | None]:
        folders = [self._names[i].partition("/") for i in range(len(self))]
        if not all(slash for _, slash, _ in folders):
            return None, None
        names = sorted({folder for folder, _, _ in folders}, key=os.fsencode)
        number = {name: i for i, name in enumerate(names)}
        labels = np.array([number[folder] for folder, _, _ in folders], dtype=np.int64)
        return labels, names


def _is_array(name: str) -> bool:
    return name.lower().endswith(".npy")


def _no_images(root: str, listing: Listing) -> str:
    text = f"no images in the folder {root}"
    if listing.others:
        kinds = Counter(os.path.splitext(name)[1] or name for name in listing.others)
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        text += f" (it holds {found})"
    if listing.dangling:
        text += f"; {len(listing.dangling)} links lead nowhere, e.g. {listing.dangling[0]}"
    return text + ". Name a folder that holds images, directly or in subfolders."


def _report(root: str, listing: Listing) -> None:
    """Say once what is left out."""
    if listing.dangling:
        log.warning(
            "%s: skipped %d links that lead nowhere, e.g. %s",
            root, len(listing.dangling), listing.dangling[0],
        )  # fmt: skip
    if listing.loops:
        log.warning(
            "%s: did not follow %d links to a folder above them, e.g. %s",
            root, len(listing.loops), listing.loops[0],
        )  # fmt: skip
    for extension in (".tar", ".npy"):
        ignored = sum(name.lower().endswith(extension) for name in listing.others)
        if ignored:
            log.warning("%s: ignored %d %s files among the images", root, ignored, extension)
    log.info("%s: %d images, %d other files", root, len(listing.images), len(listing.others))
