"""Put what was written under its name: whole or not at all, and over nothing by surprise."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinoscale.checkpoint.sums import sha256
from dinoscale.errors import ConversionError

CARD_FILE = "dinoscale.json"  # in a folder; beside a file, ".json" is added to the file's name


def card_path(target: Path, *, is_folder: bool) -> Path:
    """Where the card of a target lies."""
    return target / CARD_FILE if is_folder else target.with_name(f"{target.name}.json")


def refuse_existing(target: Path, *, is_folder: bool, overwrite: bool) -> None:
    """Refuse a target that is there already, unless it may be replaced.

    Raises:
        ConversionError: it exists; or `overwrite`, and it is not the same kind of thing, or a
            folder that was not written here.
    """
    card = card_path(target, is_folder=is_folder)
    if not target.exists() and (is_folder or not card.exists()):
        return
    if not overwrite:
        there = target if target.exists() else card
        raise ConversionError(f"{there} exists: choose another target, or add --overwrite")
    if target.is_dir() and not (is_folder and card.is_file()):
        raise ConversionError(f"{target} is a folder that this command did not write: remove it")
    if is_folder and target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file, and a folder is to be written: remove it")


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A new folder beside a target, gone afterwards.

    Raises:
        ConversionError: nothing can be written there.
    """
    place = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir()
    except OSError as error:
        raise ConversionError(f"{target} cannot be written ({error.strerror})") from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def put_in_place(written: Path, target: Path, card_text: str) -> None:
    """Give a written file or folder its name, with its card in it or beside it.

    Args:
        written: in a folder beside the target.
        target: its name; what has it is replaced.
        card_text: contents of the card.
    """
    is_folder = written.is_dir()
    card = card_path(written, is_folder=is_folder)
    card.write_text(card_text)
    for file in sorted(written.iterdir()) if is_folder else [written, card]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if not is_folder:  # the card first: a weights file never lies there without its own
        os.replace(card, card_path(target, is_folder=False))
    elif target.exists():
        os.replace(target, written.with_name("replaced"))
    os.replace(written, target)


def checksums(written: Path) -> dict[str, str]:
    """SHA-256 of a file, or of every file in a folder, by name."""
    files = sorted(written.iterdir()) if written.is_dir() else [written]
    return {file.name: sha256(file) for file in files}
