"""Where each file lies in a tar, read header by header without unpacking.

About three times as fast as the standard library, which builds and keeps an object of thirty fields
for each member. Here a damaged header in the middle is an error; there it is the end of the tar.
Understands ustar (POSIX.1-1988), pax (POSIX.1-2001) and the long names and sizes of GNU tar.
"""

import logging
from collections.abc import Iterator
from typing import NamedTuple

from dinoscale.data.sources.reopening_file import ReopeningFile
from dinoscale.errors import DataError
from dinoscale.runtime.retry import read_error

log = logging.getLogger(__name__)

_BLOCK = 512  # bytes; headers and data begin at multiples of it
_COMPRESSED = (  # magic number, its name, what unpacks it
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\x00", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unzstd"),
    (b"PK\x03\x04", "zip", "unzip"),
)
_READ_BYTES = 4096  # a page: reading it costs as much as one header
_FILES = b"0\x007"  # plain, plain of 1979, contiguous
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: whatever their size field says
_PAX, _LONG_NAME, _SPARSE = b"xX", b"L", b"S"
_MAX_DIGITS = 19  # of the largest size of a file, 2^63 - 1; Python refuses thousands of digits


class Member(NamedTuple):
    """A plain file in a tar; offset and size of its bytes."""

    name: str
    offset: int
    size: int


def read_members(path: str, within: Member | None = None) -> Iterator[Member]:
    """Yield the plain files of an uncompressed tar in their order.

    Args:
        path: path of the tar.
        within: a member that is a tar itself, whose files are yielded instead.

    Raises:
        DataError: it cannot be read up to its end.
        UnavailableError: the file system failed for about a minute.
    """
    try:
        with ReopeningFile(path) as file:
            if within is None:
                yield from _walk(file, path, 0, file.status().st_size)
            else:
                end = within.offset + within.size
                yield from _walk(file, f"{path}::{within.name}", within.offset, end)
    except OSError as error:
        raise read_error(f"the shard {path}", error) from error


def _walk(file: ReopeningFile, path: str, start: int, end: int) -> Iterator[Member]:
    """The tar between two bytes of a file."""
    at = start
    ahead, ahead_at = b"", start  # the last read: small members and their headers share it
    name, size = b"", -1  # of the next member, if an extra header before it states them
    while True:
        if at + _BLOCK > ahead_at + len(ahead):
            wanted = max(0, min(_READ_BYTES, end - at))
            ahead, ahead_at = file.read_at(wanted, at), at
        block = ahead[at - ahead_at : at - ahead_at + _BLOCK]
        if not block.strip(b"\0"):
            break
        if not _is_header(block):
            if at == start:
                _check_start(path, block)
            raise _damaged(path, f"no valid header at byte {at}")
        kind = block[156:157]
        stated = _number(block[124:136])
        taken = size if size >= 0 and kind in _FILES else stated
        data = at + _BLOCK
        at = data if kind in _WITHOUT_DATA else data + -(-taken // _BLOCK) * _BLOCK
        if at > data and data + taken > end:
            ends = f"{_text(name or _short_name(block))} ends beyond its {end - start} bytes"
            raise _damaged(path, ends)
        if kind in _PAX:
            pax_name, size = _pax(file.read_at(taken, data), path)
            name = pax_name or name
        elif kind == _LONG_NAME:
            name = file.read_at(taken, data).rstrip(b"\0")
        elif kind == _SPARSE:
            raise DataError(f"the shard {path} holds sparse files. Pack it without --sparse.")
        elif kind not in b"Kg":  # a long link and the defaults of pax say nothing of use here
            full_name = name or _short_name(block)
            if kind in _FILES and not full_name.endswith(b"/"):
                yield Member(_text(full_name), data, taken)
            name, size = b"", -1
    _check_end(path, block, at - start)


def _check_start(path: str, block: bytes) -> None:
    """Name the usual mistakes."""
    for magic, name, tool in _COMPRESSED:
        if block.startswith(magic):
            raise DataError(
                f"the shard {path} is compressed ({name}), but its images are read in any order. "
                f"Unpack it with `{tool}` to a plain .tar; the images are compressed already."
            )
    if block.lstrip().startswith(b"<"):
        raise DataError(
            f"the shard {path} is a web page, not a tar; its download failed. Download it again."
        )


def _check_end(path: str, block: bytes, at: int) -> None:
    if at == 0 and len(block) < _BLOCK:
        raise DataError(f"the shard {path} is empty ({len(block)} bytes). Copy or build it again.")
    if not block:
        log.warning("the shard %s has no end mark; it may have been cut off between members", path)


def _damaged(path: str, what: str) -> DataError:
    return DataError(
        f"the shard {path} is damaged or cut off: {what}. Copy or build it again, or leave it out "
        "of the data."
    )


def _is_header(block: bytes) -> bool:
    """Whether the checksum is the one stated, in either of its two historic definitions."""
    if len(block) < _BLOCK:
        return False
    try:
        stated = _number(block[148:156])
        _number(block[124:136])
    except ValueError:
        return False
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if stated == unsigned:
        return True
    rest = block[:148] + block[156:]
    return stated == unsigned - 256 * sum(byte > 127 for byte in rest)  # as signed characters


def _number(data: bytes) -> int:
    """Octal text, or (GNU, for 8 GiB and more) a binary number after the byte 0x80."""
    if data[0] == 0x80:
        return int.from_bytes(data[1:], "big")
    text = data.partition(b"\0")[0].strip()
    if text and not text.isdigit():  # a negative size would lead back to an earlier header
        raise ValueError(text)
    return int(text, 8) if text else 0


def _short_name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax(data: bytes, path: str) -> tuple[bytes, int]:
    r"""Name and size from records `LENGTH KEY=VALUE\n`; empty and -1 if not stated."""
    name, size = b"", -1
    while data.strip(b"\0"):
        length = data.partition(b" ")[0]
        if not _is_size(length) or not len(length) < int(length) <= len(data):
            raise _damaged(path, "a pax header is not valid")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            name = value
        elif key == b"size":
            if not _is_size(value):
                raise _damaged(path, "a pax header is not valid")
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise DataError(f"the shard {path} holds sparse files. Pack it without --sparse.")
        data = data[int(length) :]
    return name, size


def _is_size(text: bytes) -> bool:
    """Whether a text is a number of bytes that a file can have."""
    return text.isdigit() and len(text) <= _MAX_DIGITS
