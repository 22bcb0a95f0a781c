"""Put a conversion in its place, whole or not at all, and over nothing without `--overwrite`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinoscale.convert.run_checkpoint import is_run
from dinoscale.errors import OutputError
from dinoscale.runtime.outputs import (
    CARD_FILE,
    card_sums,
    is_same,
    require_our_folder,
    require_ours,
    sha256,
    swap,
)


def card_path(target: Path, *, is_folder: bool) -> Path:
    """Path of a target's card."""
    return target / CARD_FILE if is_folder else target.with_name(f"{target.name}.json")


def refuse_existing(target: Path, source: Path, *, is_folder: bool, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is ours and may be replaced.

    Args:
        target: file or folder to write.
        source: what is read.
        is_folder: whether the target is a folder.
        overwrite: whether an earlier conversion may be replaced.

    Raises:
        OutputError: it exists; or, with `overwrite`, it is the source or a part of it, a file for a
            folder, or not as a conversion left it.
        OSError: it cannot be read.
    """
    card = card_path(target, is_folder=is_folder)
    if not os.path.lexists(target) and (is_folder or not os.path.lexists(card)):
        return
    if not overwrite:
        there = target if os.path.lexists(target) else card
        raise OutputError(f"{there} exists: choose another target, or add --overwrite")
    if _is_read(target, source):
        raise OutputError(f"{target} overlaps the source {source}: choose another target")
    if target.is_dir():
        require_our_folder(target)
        return
    if is_folder and os.path.lexists(target):
        raise OutputError(f"{target} is a file, where a folder will be written: remove it")
    require_ours(target)
    if os.path.lexists(card) and not card_sums(card):
        raise OutputError(f"{card} exists, and is not the card of a conversion: remove it")


def _is_read(target: Path, source: Path) -> bool:
    """Whether a target is the source, is in its folder of weights, or contains it."""
    if is_same(target, source):
        return True
    one, other = target.resolve(), source.resolve()
    within = source.is_dir() and not is_run(source) and one.is_relative_to(other)
    return within or (target.is_dir() and other.is_relative_to(one))


def put_in_place(written: Path, target: Path, card_text: str) -> None:
    """Rename a written file or folder to its target, with its card in it or beside it.

    If that fails, what was there before is restored.

    Args:
        written: in an `outputs.staging_folder` of the target.
        target: the final name; what has it is replaced.
        card_text: contents of the card.
    """
    is_folder = written.is_dir()
    card = card_path(written, is_folder=is_folder)
    card.write_text(card_text)
    for file in sorted(written.iterdir()) if is_folder else [written, card]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if is_folder:
        swap(written, target)
        return
    # The card first: a weights file is never there without its own.
    with _replaced(card, card_path(target, is_folder=False)):
        swap(written, target)
    within = target.with_name(CARD_FILE)
    if target.name in card_sums(within):  # card of a folder that this file belonged to
        within.unlink()


@contextmanager
def _replaced(file: Path, target: Path) -> Iterator[None]:
    """Replace `target` by `file`, and restore it if the block fails."""
    before = file.with_name("card before")
    with contextlib.suppress(FileNotFoundError):
        os.replace(target, before)
    os.replace(file, target)
    try:
        yield
    except OSError:
        os.replace(target, file)
        with contextlib.suppress(FileNotFoundError):
            os.replace(before, target)
        raise


def checksums(written: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file in a folder, by name."""
    files = sorted(written.iterdir()) if written.is_dir() else [written]
    return {file.name: sha256(file) for file in files}
