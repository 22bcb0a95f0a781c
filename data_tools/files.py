"""The sources of the tools, whose images are files with bytes and sizes.

Besides folders and shards, as in a training, these are lists of files, such as those of
`deduplicate`, and the tars of ImageNet.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dinoscale.data.decoding.decode import RGB, Decoder, Picture
from dinoscale.data.shards.tar_headers import Member, read_members
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.image_files import unavailable, write_names
from dinoscale.data.sources.left_out import is_junk
from dinoscale.data.sources.listing import (
    COMPRESSED_TAR,
    Listing,
    OtherFiles,
    class_folders,
    list_folder,
)
from dinoscale.data.sources.reopening_file import ReopeningFile
from dinoscale.data.sources.source import Source, expand_pattern, open_source
from dinoscale.errors import DataError, UnavailableError
from dinoscale.runtime.fingerprint import (
    Fingerprint,
    code_fingerprint,
    digest_of,
    files_fingerprint,
    fingerprint,
)
from dinoscale.runtime.retry import RetryBudget, path_exists, with_retries

log = logging.getLogger(__name__)

_TARS = (".tar", *COMPRESSED_TAR)
_ROOT_ENDS = "/./"  # stands in a list between the folder of a set and a path below it
_MEMBER = ".tar::"  # stands between a shard and a picture in it, as in `a.tar::0001.jpg`


class Files(Source, Protocol):
    """A source whose images are files."""

    def files(self) -> Iterator[str]:
        """Absolute paths of the files that hold the images, in an order that fixes theirs."""
        ...

    def size(self, index: int) -> int:
        """Bytes of the file."""
        ...

    def data(self, index: int) -> bytes:
        """The file as it is, or BadSampleError."""
        ...


def open_files(spec: str, decoder: Decoder = RGB) -> Files:
    """Open a folder, shards, a list of files, or a tar of tars.

    Args:
        spec: a folder of images; shards as `open_source` takes them; a text file with one path per
            line, absolute or relative to its folder, `shard.tar::member` for a picture in a shard,
            `root/./class/file` where the classes lie below a root that not all paths share; or a
            tar of one tar per class, such as ImageNet's training pictures.
        decoder: decodes the files.

    Raises:
        DataError: there is nothing, it cannot be read, or it holds no files of images.
    """
    path = os.path.expanduser(spec)
    with_retries(lambda: path_exists(path), path)  # or the file system fails
    if os.path.isfile(path):
        if not path.lower().endswith(_TARS):
            return _open_list(path, decoder)
        if path.lower().endswith(".tar") and _holds_tars(path):
            return TarOfTars(path, decoder)
    source = open_source(spec, decoder)
    if isinstance(source, FolderSource | TarSource):
        return source
    raise DataError(
        f"{spec}: this tool reads files on a disk. Write a synthetic set with `dinoscale data"
        " synthetic`; copy a remote one."
    )


def open_pictures(spec: str, decoder: Decoder) -> Source:
    """Open what `open_files` reads, or a synthetic set, which has no files.

    Raises:
        DataError: as `open_files`.
    """
    if spec.startswith("synthetic:"):
        return open_source(spec, decoder)
    return open_files(spec, decoder)


def images_print(source: Source | Files, spec: str) -> dict[str, object]:
    """The part of a fingerprint for a set: its files as they are, and which of their images.

    Raises:
        UnavailableError: the file system failed for about a minute.
    """
    if not isinstance(source, FolderSource | TarSource | TarOfTars | Selection):
        return {"drawn": spec}
    files = source.files()
    if isinstance(source, FolderSource):
        return files_fingerprint(source.root, files)
    paths = list(files)
    chosen = {"chosen": digest_of(source.ids.tolist())} if isinstance(source, Selection) else {}
    return {**files_fingerprint(os.path.dirname(paths[0]), paths), **chosen}


def work_fingerprint(
    source: Source | Files, spec: str, *, command: Mapping[str, object], module: str
) -> Fingerprint:
    """Fingerprint of what a tool does with a set.

    Args:
        source: the set.
        spec: what the set was opened from.
        command: settings that decide the result.
        module: the module that does it.

    Raises:
        UnavailableError: the file system failed for about a minute.
    """
    return fingerprint(
        input={"images": images_print(source, spec)}, command=command, code=code_fingerprint(module)
    )


def shards_of(spec: str) -> list[str]:
    """Shards that a spec names, empty if it names anything else.

    Raises:
        DataError: the pattern matches nothing.
    """
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        listing = list_folder(path)
        names = sorted(listing.other_files.shards + listing.other_files.compressed, key=os.fsencode)
        return [] if len(listing.images) else [os.path.join(path, name) for name in names]
    if os.path.isfile(path):
        return [path] if path.lower().endswith(".tar") and not _holds_tars(path) else []
    if ":" in spec.partition("/")[0]:  # synthetic or remote: no files here
        return []
    found = expand_pattern(path)
    return found if all(name.lower().endswith(".tar") for name in found) else []


def _holds_tars(path: str) -> bool:
    """Whether the first file in a tar is a tar; False for a damaged one, refused by its reader."""
    try:
        first = next(read_members(path), None)
    except UnavailableError:
        raise
    except DataError:
        return False
    return first is not None and first.name.lower().endswith(".tar")


class TarOfTars:
    """The pictures of a tar of tars, one per class, read without unpacking.

    All files but junk count as pictures. Member names are only shown, never used as paths.

    Raises:
        DataError: a tar is damaged, or holds no files.
    """

    def __init__(self, path: str, decoder: Decoder = RGB):
        self._path = os.path.abspath(path)
        self._retries = RetryBudget()
        self._decoder = decoder
        self._names: list[str] = []  # INNER.tar::MEMBER
        places: list[tuple[int, int, int]] = []  # offset, bytes, class
        members = [file for file in read_members(self._path) if not is_junk(file.name)]
        inner = [tar for tar in members if tar.name.lower().endswith(".tar")]
        others = [file.name for file in members if not file.name.lower().endswith(".tar")]
        _warn_of_others(path, others)
        self._classes = sorted({_class_name(tar) for tar in inner}, key=os.fsencode)
        number = {name: i for i, name in enumerate(self._classes)}
        for tar in inner:
            for file in read_members(self._path, within=tar):
                if is_junk(file.name):
                    continue
                self._names.append(f"{tar.name}::{file.name}")
                places.append((file.offset, file.size, number[_class_name(tar)]))
        if not places:
            raise DataError(f"{path}: there are no files in its {len(inner)} tars")
        self._places = np.array(places, dtype=np.int64)
        log.info("%s: %d files in %d tars", path, len(places), len(inner))

    def __len__(self) -> int:
        return len(self._names)

    def files(self) -> Iterator[str]:
        """The one tar."""
        yield self._path

    def path(self, index: int) -> str:
        """`outer.tar::inner.tar::member`."""
        return f"{self._path}::{self._names[index]}"

    def size(self, index: int) -> int:
        """Bytes of a picture's file."""
        return int(self._places[index, 1])

    def data(self, index: int) -> bytes:
        """The file of a picture.

        Raises:
            BadSampleError: it cannot be read, or the tar has become shorter.
        """
        offset, size, _ = self._places[index].tolist()
        try:
            with ReopeningFile(self._path, self._retries) as file:
                data = file.read_at(size, offset)
            if len(data) < size:
                raise OSError("the tar has become shorter")
        except OSError as error:
            raise unavailable(self.path(index), error) from None
        return data

    def picture(self, index: int) -> Picture:
        """Decode a picture; raises BadSampleError."""
        return self._decoder.open(self.data(index), self.path(index))

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class numbers (N,)."""
        return self._places[:, 2]

    @property
    def class_names(self) -> list[str]:
        """Names of the inner tars, sorted."""
        return self._classes


def _warn_of_others(path: str, names: Sequence[str]) -> None:
    if names:
        log.warning(
            "%s: left out %d files that lie beside its tars, e.g. %s", path, len(names), names[0]
        )


def _class_name(tar: Member) -> str:
    return tar.name.rpartition("/")[2][: -len(".tar")]


class Selection:
    """Some images of a source in an order of their own."""

    def __init__(self, source: Files, ids: NDArray[np.int64]):
        self._source = source
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Numbers of the images in the source, (N,)."""
        return self._ids

    def files(self) -> Iterator[str]:
        """The files of the source."""
        return self._source.files()

    def path(self, index: int) -> str:
        """As in the source."""
        return self._source.path(int(self._ids[index]))

    def size(self, index: int) -> int:
        """As in the source."""
        return self._source.size(int(self._ids[index]))

    def data(self, index: int) -> bytes:
        """As in the source."""
        return self._source.data(int(self._ids[index]))

    def picture(self, index: int) -> Picture:
        """As in the source."""
        return self._source.picture(int(self._ids[index]))

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """As in the source."""
        labels = self._source.labels
        return None if labels is None else labels[self._ids]

    @property
    def class_names(self) -> list[str] | None:
        """As in the source."""
        return self._source.class_names


def _open_list(path: str, decoder: Decoder) -> Files:
    folder = os.path.dirname(os.path.abspath(path))
    read = with_retries(Path(path).read_bytes, f"the list {path}")
    lines = [os.fsdecode(line) for line in read.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"the list {path} is empty. It needs one path of a picture per line.")
    if "\0" in "".join(lines[:100]):
        raise DataError(f"{path} is neither a folder, nor a .tar, nor a list of paths")
    paths = [_normal(folder, line) for line in lines]
    members = sum(_MEMBER in line for line in paths)
    if members == len(paths):
        return _members_of_shards(path, paths, decoder)
    if members:
        raise DataError(f"the list {path} mixes files and `shard.tar::member`; make it two lists")
    roots = {line.partition(_ROOT_ENDS)[0] if _ROOT_ENDS in line else None for line in lines}
    root = roots.pop() if len(roots) == 1 else None
    return _listed_files(path, paths, decoder, root=root and _normal(folder, root))


def _normal(folder: str, line: str) -> str:
    """Absolute path; a member name after the name of a tar is left as it is."""
    path, tar, member = line.partition(_MEMBER)
    return os.path.normpath(os.path.join(folder, os.path.expanduser(path))) + tar + member


def _listed_files(path: str, paths: Sequence[str], decoder: Decoder, *, root: str | None) -> Files:
    """Files below a root, or their common folder, whose subfolders are the classes.

    Classes without listed files count, too: a class has the same number in a list and its folder.
    """
    missing = [name for name in paths if not with_retries(partial(path_exists, name), name)]
    if missing:
        raise DataError(
            f"the list {path}: {len(missing)} of {len(paths)} files are not there, the first is "
            f"{missing[0]}. Relative paths begin at the folder of the list."
        )
    root = root or os.path.commonpath([os.path.dirname(name) for name in paths])
    names = write_names((os.path.relpath(name, root) for name in paths), of=path)
    classes = class_folders(root) if root != os.path.dirname(root) else []  # not of a whole disk
    return FolderSource(root, Listing(names, OtherFiles()), decoder, classes=classes)


def _members_of_shards(path: str, paths: Sequence[str], decoder: Decoder) -> Files:
    shards = list(dict.fromkeys(line.partition(_MEMBER)[0] + ".tar" for line in paths))
    nested = len(shards) == 1 and _holds_tars(shards[0])
    source: Files = TarOfTars(shards[0], decoder) if nested else TarSource(shards, decoder)
    number = {source.path(i): i for i in range(len(source))}
    missing = [line for line in paths if line not in number]
    if missing:
        raise DataError(
            f"the list {path}: {len(missing)} of {len(paths)} pictures are not in their shards, "
            f"the first is {missing[0]}"
        )
    return Selection(source, np.array([number[line] for line in paths], dtype=np.int64))
