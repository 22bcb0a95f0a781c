"""Checksums of a checkpoint's files, in the format of `sha256sum --check SHA256SUMS`."""

import mmap
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from dinoscale.checkpoint.index import index_of_headers
from dinoscale.checkpoint.layout import INDEX_FILE, SHARD_PREFIX, STATE_FILE, SUMS_FILE
from dinoscale.checkpoint.read_errors import with_retries
from dinoscale.errors import CheckpointError
from dinoscale.runtime.outputs import sha256

_FLUSHED_BYTES = 1 << 26  # at a time
_HEX_DIGITS = 64


def flush(path: Path) -> None:
    """Flush a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flushed_sum(path: Path, heartbeat: Callable[[], None] = lambda: None) -> str:
    """Flush a file to disk and return its digest; `heartbeat` is called regularly."""
    if path.stat().st_size > _FLUSHED_BYTES:
        _flush_in_pieces(path, heartbeat)
    flush(path)
    return sha256(path, heartbeat)


def _flush_in_pieces(path: Path, heartbeat: Callable[[], None]) -> None:
    """Flush a file piece by piece; all at once could take long without a call of `heartbeat`."""
    with path.open("r+b") as file:
        try:
            whole = mmap.mmap(file.fileno(), 0)
        except OSError:  # this file system has no mmap
            return
        with whole:
            for begin in range(0, len(whole), _FLUSHED_BYTES):
                whole.flush(begin, min(_FLUSHED_BYTES, len(whole) - begin))
                heartbeat()


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the list of `sums`, file name -> digest, into `folder` and flush it to disk."""
    path = folder / SUMS_FILE
    path.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    flush(path)
    flush(folder)


def seal(part: Path, target: Path, sums: Mapping[str, str]) -> None:
    """Finish a checkpoint: write its index and list of sums, then rename it, flushed to disk.

    Raises:
        OSError, CheckpointError: it cannot be written, or the written files cannot be read.
    """
    shards = sorted(name for name in sums if name.startswith(SHARD_PREFIX))
    (part / INDEX_FILE).write_bytes(index_of_headers(part, shards).to_bytes())
    write_sums(part, {**sums, INDEX_FILE: flushed_sum(part / INDEX_FILE)})
    part.rename(target)
    flush(target.parent)


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> digest of a checkpoint.

    Raises:
        CheckpointError: the list is missing, damaged or unreadable.
    """
    path = folder / SUMS_FILE
    try:
        text = with_retries(path.read_text, path)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    sums = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != _HEX_DIGITS or not name or Path(name).name != name:
            raise CheckpointError(f"{path} is damaged: {line[:100]!r} is not a checksum and a name")
        sums[name] = digest
    if not text.endswith("\n") or STATE_FILE not in sums:  # the last entry, as the list is sorted
        raise CheckpointError(f"{path} is damaged: its end is missing")
    return sums


def verify(
    folder: Path,
    *,
    share: int = 0,
    num_shares: int = 1,
    heartbeat: Callable[[], None] = lambda: None,
) -> int:
    """Compare a checkpoint's files with their checksums.

    Args:
        folder: a step_* directory.
        share: which part of the files to read, so that ranks can divide the work.
        num_shares: number of parts.
        heartbeat: called regularly.

    Returns:
        Bytes of these files.

    Raises:
        MissingFileError: a file, or the list of checksums, is missing.
        UnreadableError: a file cannot be read.
        CheckpointError: a file differs in two readings, or the list is damaged.
    """
    sums = read_sums(folder)
    name = first_difference(folder, sums, share=share, num_shares=num_shares, heartbeat=heartbeat)
    if name is not None:
        raise difference(folder, name)
    paths = [folder / name for name in sorted(sums)[share::num_shares]]
    return sum(with_retries(path.stat, path).st_size for path in paths)


def difference(folder: Path, name: str) -> CheckpointError:
    """The error for a file that does not match its checksum."""
    return CheckpointError(
        f"{folder} is damaged: {name} does not match its checksum in {SUMS_FILE}"
    )


def first_difference(
    folder: Path,
    sums: Mapping[str, str],
    *,
    share: int = 0,
    num_shares: int = 1,
    heartbeat: Callable[[], None] = lambda: None,
) -> str | None:
    """Name of the first file that fails its checksum in two readings; arguments as in `verify`.

    Raises:
        MissingFileError: a file is missing.
        UnreadableError: a file cannot be read.
    """
    for name, expected in sorted(sums.items())[share::num_shares]:
        if not matches(folder / name, expected, heartbeat):
            drop_from_page_cache(folder / name)
            if not matches(folder / name, expected, heartbeat):
                return name
    return None


def matches(path: Path, expected: str, heartbeat: Callable[[], None] = lambda: None) -> bool:
    """Whether a file has this digest; `heartbeat` is called regularly.

    Raises:
        MissingFileError: it is missing.
        UnreadableError: it cannot be read.
    """
    return with_retries(lambda: sha256(path, heartbeat), path) == expected


def drop_from_page_cache(path: Path) -> None:
    """Ask the kernel to read the file from storage next time, not from its page cache."""
    with suppress(OSError, AttributeError):  # only a hint, and macOS lacks it
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
