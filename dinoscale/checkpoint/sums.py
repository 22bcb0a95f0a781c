"""Checksums of a checkpoint's files, in the format of `sha256sum --check SHA256SUMS`."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from dinoscale.checkpoint.layout import STATE_FILE, SUMS_FILE
from dinoscale.errors import CheckpointError

_BLOCK_BYTES = 1 << 20
_HEX_DIGITS = 64


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Return when a file or directory is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flushed_sum(path: Path) -> str:
    """Put a file on disk and return its digest."""
    flush(path)
    return sha256(path)


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the list of `sums`, file name -> digest, into `folder` and onto the disk."""
    path = folder / SUMS_FILE
    path.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    flush(path)
    flush(folder)


def seal(part: Path, target: Path, sums: Mapping[str, str]) -> None:
    """Complete a checkpoint: write its list of `sums`, then give it its name, all on disk."""
    write_sums(part, sums)
    part.rename(target)
    flush(target.parent)


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> digest of a checkpoint.

    Raises:
        CheckpointError: there is no list, or it is damaged.
    """
    path = folder / SUMS_FILE
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: {path.name}: {error}"
        ) from error
    sums = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != _HEX_DIGITS or not name or Path(name).name != name:
            raise CheckpointError(f"{path} is damaged: {line[:100]!r} is not a checksum and a name")
        sums[name] = digest
    if not text.endswith("\n") or STATE_FILE not in sums:  # written last, as the list is sorted
        raise CheckpointError(f"{path} is damaged: its end is missing")
    return sums


def verify(folder: Path, *, share: int = 0, num_shares: int = 1) -> int:
    """Compare a checkpoint's files with their checksums.

    Args:
        folder: a step_* directory.
        share: which part of the files to read, so that ranks can divide the work.
        num_shares: into how many parts they are divided.

    Returns:
        Bytes read.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    num_bytes = 0
    for name, expected in sorted(read_sums(folder).items())[share::num_shares]:
        path = folder / name
        try:
            size = path.stat().st_size
            found = sha256(path)
        except OSError as error:
            raise CheckpointError(
                f"{folder} is damaged: {name} cannot be read: {error.strerror or error}"
            ) from error
        if found != expected:
            raise CheckpointError(
                f"{folder} is damaged: {name} ({size} bytes) does not match its checksum"
                f" in {SUMS_FILE}"
            )
        num_bytes += size
    return num_bytes
