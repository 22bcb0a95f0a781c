"""Output files: written whole or not at all, and never over files that dinoscale did not write.

A file is ours while it is unchanged since we wrote it. The list `.dinoscale-files.txt` in its
folder shows that (lines as `sha256sum` writes them); for weights their card does, and for presets
their first line.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dinoscale.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

PHASES = "phases"  # folder in a run_dir of the run directories of its phases
BEST_WEIGHTS = "best.safetensors"  # in the run directory; of a run of phases, one for all
LIST_FILE = ".dinoscale-files.txt"  # what we wrote in a folder; sources of images skip it
MARK = "# Recommended by `dinoscale sweep`."  # the first line of each of our presets
CARD_FILE = "dinoscale.json"  # in a folder; beside a file, ".json" is added to the file's name
METADATA_KEY = "dinoscale"  # key of the card in the metadata of weights
_BLOCK_BYTES = 1 << 20
_MAX_CARD_BYTES = 16 * 2**20  # real ones have some kilobytes


def is_phase(run_dir: Path) -> bool:
    """Whether a run directory is that of a phase, by where it lies."""
    return run_dir.parent.name == PHASES


def run_name(run_dir: Path) -> str:
    """What people call a run: the name of its directory; of a phase, that of the run before it."""
    path = run_dir.resolve()
    run = path.parent.parent.name
    return f"{run}/{path.name}" if is_phase(path) else path.name


def require_ours(path: Path, *, source: object = None) -> None:
    """Refuse to overwrite a file that is not as we wrote it, or that is the input.

    Args:
        path: of the file; an empty one may be overwritten.
        source: path of the input, if it has one.

    Raises:
        OutputError: it is the source, or not as we wrote it.
    """
    if source is not None and is_same(path, source):
        raise OutputError(f"{path} is the input: choose another name to write to")
    if not is_ours(path):
        raise OutputError(
            f"{path} exists, and is not as dinoscale wrote it: choose another name, or remove it"
        )


def is_ours(path: Path) -> bool:
    """Whether a path is free, an empty file, or a readable file unchanged since we wrote it."""
    if not os.path.lexists(path):
        return True
    try:
        return path.is_file() and (
            not path.stat().st_size or _has_mark(path) or sha256(path) in _sums(path)
        )
    except OSError:
        return False


def _has_mark(path: Path) -> bool:
    """Whether a file is one of our presets, or safetensors weights with our card."""
    with path.open("rb") as file:
        if file.readline(200).strip() == MARK.encode():
            return True
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        start = file.read(min(length, _MAX_CARD_BYTES))
    try:
        header = json.loads(start) if start[:1] == b"{" else None
    except (ValueError, RecursionError):
        return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and METADATA_KEY in metadata


def require_our_folder(folder: Path) -> None:
    """Refuse to replace a folder unless its card names all its files and none has changed.

    Raises:
        OutputError: a file is not in the card, or has changed.
        OSError: the folder cannot be read.
    """
    sums = card_sums(folder / CARD_FILE)
    for path in sorted(folder.iterdir()):
        known = path.name == CARD_FILE and sums
        if not known and not (path.is_file() and sums.get(path.name) == sha256(path)):
            raise OutputError(
                f"{folder} is a folder that this command did not write, or that has changed"
                f" ({path.name}): remove it"
            )


def is_same(path: Path, source: object) -> bool:
    """Whether a path and the input are the same file or folder, by any name."""
    try:
        return os.path.samefile(path, str(source))
    except (OSError, ValueError):  # a source may also be a pattern or an address
        return False


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and rename it to `path` if the block succeeds.

    Folders above `path` are made; the temporary file has the same name in a folder beside it.

    Raises:
        OutputError: a file is there that is not ours.
        OSError: it cannot be written; what was there is unchanged.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    require_ours(path)
    with staging_folder(path) as folder:
        beside = folder / path.name
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        _record(path, sha256(beside))
        os.replace(beside, path)


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into a sentence.

    Raises:
        OutputError: a write within the block fails.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot write to {error.filename or folder}: {reason}") from error


def replace_text(path: Path, text: str) -> None:
    """Replace a file of a run or a sweep, whole or not at all.

    Such a file is ours by the folder that it lies in; no list has to say so.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with the usual permissions; the library alone makes it 0600.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    from safetensors.torch import save_file  # here: data tools import this module without torch

    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside a target, removed afterwards.

    Raises:
        OSError: nothing can be written there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # A random name: another node may reuse a process id, and so may this one after a kill.
    folder = Path(tempfile.mkdtemp(".tmp", f".{target.name[:50]}.", target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def swap(written: Path, target: Path) -> None:
    """Rename a written file or folder to its target; on failure the old target is restored.

    Args:
        written: in a `staging_folder` of the target, which also holds a replaced folder meanwhile.
        target: the final name.

    Raises:
        OSError: it cannot be renamed.
    """
    if not (written.is_dir() and os.path.lexists(target)):
        os.replace(written, target)
        return
    before = written.with_name(f"{target.name} before")
    os.replace(target, before)
    try:
        os.replace(written, target)
    except OSError:
        os.replace(before, target)
        raise


def card_sums(card: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files that a card of `dinoscale convert` describes.

    Empty without such a card: JSON beside a weights file may come from another program.
    """
    try:
        if card.stat().st_size > _MAX_CARD_BYTES:
            return {}
        content = json.loads(card.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    files = content.get("files") if isinstance(content, dict) and "dinoscale" in content else None
    if not isinstance(files, dict):
        return {}
    return {name: digest for name, digest in files.items() if isinstance(digest, str)}


def sha256(path: Path, heartbeat: Callable[[], None] = lambda: None) -> str:
    """Hexadecimal digest of a file's contents; `heartbeat` is called after every megabyte."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            heartbeat()
    return digest.hexdigest()


def _sums(path: Path) -> set[str]:
    """Digests that a file has if it is as we wrote it."""
    beside = card_sums(path.with_name(f"{path.name}.json"))
    if len(beside) == 1:  # file and card may have been renamed
        beside = {path.name: next(iter(beside.values()))}
    cards = {
        sums[path.name]
        for sums in (beside, card_sums(path.with_name(CARD_FILE)))
        if path.name in sums
    }
    return cards | _listed(path)


@dataclass
class _List:
    """The part of a list that has been read."""

    end: int = 0  # bytes
    digests: dict[bytes, set[str]] = field(default_factory=dict)  # by file name


_LISTS: dict[tuple[int, int], _List] = {}  # by device and inode


def _listed(path: Path) -> set[str]:
    """Digests of a file in the lists of its folder."""
    name = os.fsencode(path.name)
    found = [_read_list(place).get(name, set()) for place in _lists_beside(path)]
    return set().union(*found)


def _lists_beside(path: Path) -> list[Path]:
    """The list in the folder of a file, and this user's own where another user's is there."""
    own = LIST_FILE.replace(".txt", f"-{os.getuid()}.txt")
    return [path.with_name(LIST_FILE), path.with_name(own)]


def _read_list(path: Path) -> dict[bytes, set[str]]:
    """Read what was added to a list: a folder may get one file per image of a set."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            known = _LISTS.setdefault((state.st_dev, state.st_ino), _List())
            if state.st_size < known.end:  # replaced since
                known.end = 0
                known.digests.clear()
            file.seek(known.end)
            added = file.read()
    except OSError:
        return {}
    whole = added[: added.rfind(b"\n") + 1]
    known.end += len(whole)
    for line in whole.split(b"\n"):
        digest, _, name = line.partition(b"  ")
        known.digests.setdefault(name, set()).add(digest.decode("ascii", "replace"))
    return known.digests


def _record(path: Path, digest: str) -> None:
    """Add a file to the list in its folder before it is there: a kill leaves no unlisted file."""
    if digest in _listed(path):
        return
    for place in _lists_beside(path):
        # Without a writable list the file is written anyway, but next time it is not known as ours.
        with contextlib.suppress(PermissionError, IsADirectoryError), place.open("ab") as file:
            file.write(os.fsencode(f"{digest}  {path.name}\n"))
            return
