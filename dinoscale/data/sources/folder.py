"""Images in files of their own: those of a folder, or those that a list names."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from dinoscale.data.decoding.decode import RGB, Decoder, Picture
from dinoscale.data.sources.image_files import NAMES_PER_HEARTBEAT, read_image_file, write_names
from dinoscale.data.sources.left_out import DEAD_LINK, NPY, TAR, LeftOut
from dinoscale.data.sources.listing import ARRAY, Listing, OtherFiles, list_folder
from dinoscale.errors import DataError
from dinoscale.runtime.retry import RetryBudget, read_error, with_retries

log = logging.getLogger(__name__)

_MAX_PATH_BYTES = 4096  # Linux opens no longer path
_SIZES = 4096  # most file sizes read for an identity; a fraction of a second on a local disk
_FIRST_CHECKED = 100  # entries of a list, at least one of which must exist


class FolderSource:
    """Images of a folder and all its subfolders, in the byte order of their relative paths.

    `.npy` files are images if there are no others, neither pictures nor shards. The folder is
    listed whenever it is opened; the names are kept in a temporary file, not in memory. If every
    image lies in a subfolder, the first-level subfolder is its class.

    Attributes:
        root: the folder, absolute.
        left_out: files that may have been meant as images but are left out.

    Args:
        root: the folder.
        listing: listing of the folder; made now if not given.
        decoder: decodes the files.
        classes: subfolders that are classes even if the listing has no image of them.

    Raises:
        DataError: it does not exist, is not a folder, cannot be read, or holds no images.
    """

    def __init__(
        self,
        root: str,
        listing: Listing | None = None,
        decoder: Decoder = RGB,
        *,
        classes: Sequence[str] = (),
    ):
        self.root = os.path.abspath(root)
        self._all_classes = tuple(classes)
        self._retries = RetryBudget()
        self._decoder = decoder
        if not os.path.isdir(self.root):
            raise DataError(f"{root} is not a folder. Name the folder that holds the images.")
        listing = listing or list_folder(self.root)
        if not len(listing.images):
            raise DataError(_no_images(root, listing))
        self.left_out = _left_out(listing.other_files)
        self.left_out.warn(root)
        others = sum(listing.other_files.by_extension.values())
        log.info("%s: %d images, %d other files", root, len(listing.images), others)
        self._names = listing.images

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> str:
        """Absolute path of an image."""
        return os.path.join(self.root, self._names.name(index))

    def files(self) -> Iterator[str]:
        """Absolute paths of all files in the order of the images."""
        return (os.path.join(self.root, name) for name, _ in self._names.rows(0, len(self)))

    def size(self, index: int) -> int:
        """Bytes of an image's file, 0 if it is gone.

        Raises:
            DataError: the file system refuses, or fails for about a minute.
        """
        path = self.path(index)
        # Not with the retries of the source, which threads would use up at once.
        return max(0, with_retries(partial(_size_of, path), f"the size of {path}"))

    def identity(self, heartbeat: Callable[[], None] = lambda: None, /) -> str:
        """Digest of the names, and of the sizes of some thousand files, which takes seconds.

        Raises:
            DataError: a size cannot be read.
        """
        return _identity(self._names.digest(heartbeat=heartbeat), self, heartbeat)

    def data(self, index: int) -> bytes:
        """The file of an image as it is.

        Raises:
            BadSampleError: it cannot be read.
        """
        return read_image_file(self.path(index), self._retries)

    def picture(self, index: int) -> Picture:
        """Read an image.

        Raises:
            BadSampleError: it cannot be read or decoded.
        """
        return self._decoder.open(self.data(index), self.path(index))

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers (N,), or None where images lie outside any subfolder."""
        return self._classes[0]

    @property
    def class_names(self) -> list[str] | None:
        """Names of the first-level subfolders with images, sorted, or None.

        By their bytes; where all are whole numbers, by these, so that 10 comes after 2.
        """
        return self._classes[1]

    @cached_property
    def _classes(self) -> tuple[NDArray[np.int64] | None, list[str] | None]:
        met: dict[str, int] = {}  # folder -> its number in the order of the images
        labels = np.empty(len(self), dtype=np.int64)
        for index, (name, _) in enumerate(self._names.rows(0, len(self))):
            folder, slash, _ = name.partition("/")
            if not slash:
                return None, None
            labels[index] = met.setdefault(folder, len(met))
        names = in_order({*met, *self._all_classes})
        number = {name: i for i, name in enumerate(names)}
        return np.array([number[name] for name in met])[labels], names


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes as they are numbered: by their bytes; by their values, if all are digits."""
    listed = list(names)
    all_numbers = all(whole_number(name) is not None for name in listed)
    return sorted(
        listed, key=lambda name: (whole_number(name) if all_numbers else 0, os.fsencode(name))
    )


def whole_number(name: str) -> int | None:
    """The number that a name of digits is, None for any other name."""
    return int(name) if name.isascii() and name.isdigit() and len(name) < 19 else None


def _no_images(root: str, listing: Listing) -> str:
    other_files = listing.other_files
    text = f"no images in the folder {root}"
    if other_files.num_folders:
        text += f" and its {other_files.num_folders} subfolders"
    if other_files.by_extension:
        kinds = other_files.by_extension.most_common(5)
        text += f" (it holds {', '.join(f'{count} {kind}' for kind, count in kinds)})"
    if dead := other_files.links.counts.get(DEAD_LINK):
        text += f"; {dead} links lead nowhere, e.g. {other_files.links.examples[DEAD_LINK]}"
    return text + ". Name a folder that holds images, directly or in subfolders."


def _left_out(other_files: OtherFiles) -> LeftOut:
    """Files that may have been meant as images of the set; all others are ignored."""
    left_out = LeftOut()
    left_out.merge(other_files.links)
    for name in other_files.shards + other_files.compressed:
        left_out.add(TAR, name)
    if arrays := other_files.by_extension[ARRAY]:
        left_out.add(NPY, f"*{ARRAY}", arrays)
    return left_out


class ListSource:
    """Images that a text file names, one path per line, in its order; it is read at every start.

    Paths are relative to the folder of the list, bytes that are not UTF-8 are kept, blank lines are
    ignored. A missing file is a bad sample when it is read.

    Args:
        path: path of the list.
        decoder: decodes the files.
        heartbeat: called repeatedly while the list is read.

    Raises:
        DataError: it cannot be read, names nothing, or none of its first entries exists.
    """

    def __init__(
        self, path: str, decoder: Decoder = RGB, heartbeat: Callable[[], None] = lambda: None
    ):
        self._folder = os.path.dirname(os.path.abspath(path))
        self._retries = RetryBudget()
        self._decoder = decoder
        self._names = write_names(_entries(path), of=path, heartbeat=heartbeat)
        if not len(self._names):
            raise DataError(f"the list {path} is empty. Write one path of an image per line.")
        first = range(min(_FIRST_CHECKED, len(self)))
        if not any(os.path.exists(self.path(index)) for index in first):
            raise DataError(
                f"none of the first {len(first)} files that the list {path} names exists, e.g. "
                f"{self.path(0)}. Write one path per line, relative to the folder of the list."
            )
        log.info("%s: %d images", path, len(self))

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> str:
        """Absolute path of an image."""
        return os.path.join(self._folder, self._names.name(index))

    def files(self) -> Iterator[str]:
        """Absolute paths of all files in the order of the images."""
        return (os.path.join(self._folder, name) for name, _ in self._names.rows(0, len(self)))

    def identity(self, heartbeat: Callable[[], None] = lambda: None, /) -> str:
        """Digest of the last two parts of all paths, and of the sizes of some thousand files.

        Raises:
            DataError: a size cannot be read.
        """
        names = hashlib.sha256()
        for number, (name, _) in enumerate(self._names.rows(0, len(self))):
            names.update(os.fsencode("/".join(name.split("/")[-2:])) + b"\0")
            if number % NAMES_PER_HEARTBEAT == 0:
                heartbeat()
        return _identity(names.hexdigest(), self, heartbeat)

    def picture(self, index: int) -> Picture:
        """Read an image.

        Raises:
            BadSampleError: it cannot be read or decoded.
        """
        path = self.path(index)
        return self._decoder.open(read_image_file(path, self._retries), path)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """None: a list has no classes."""
        return None

    @property
    def class_names(self) -> list[str] | None:
        """None: a list has no classes."""
        return None


def _identity(names: str, source: FolderSource | ListSource, heartbeat: Callable[[], None]) -> str:
    """Digest of the digest of the names and of the sizes of files at even distances."""
    sizes = []
    for index in range(0, len(source), -(-len(source) // _SIZES)):
        path = source.path(index)
        sizes.append(with_retries(partial(_size_of, path), f"the size of {path}"))
        heartbeat()
    return hashlib.sha256(f"{names} {sizes}".encode()).hexdigest()


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1  # a bad sample, when it is read


def _entries(path: str) -> Iterator[str]:
    try:
        with with_retries(lambda: open(path, "rb"), f"the list {path}") as file:
            while line := file.readline(_MAX_PATH_BYTES + 2):
                name = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")  # UTF-8 byte order mark
                if len(name) > _MAX_PATH_BYTES:
                    raise DataError(
                        f"the list {path} has a line of more than {_MAX_PATH_BYTES} bytes: it is "
                        "not a list. Write one path of an image per line."
                    )
                if name.strip():
                    yield os.fsdecode(name)
    except OSError as error:
        raise read_error(f"the list {path}", error) from error
