"""The folder of the features of a set: arrays, a record of each finished shard, a manifest.

A shard is a run of images of the set. Its arrays are renamed into place first and its record last,
so that a shard with a record is whole. The manifest, which takes the records in, is written when
all shards have theirs: a folder without it is unfinished.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from dinoscale.errors import OutputError, RunFailedError
from dinoscale.runtime.fingerprint import differences
from dinoscale.runtime.locks import try_lock
from dinoscale.runtime.outputs import sha256

FORMAT = "dinoscale features 1"
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # the settings, until there is a manifest
LOCK = ".lock"

Record = dict[str, Any]  # JSON of a shard


class FeatureFolder:
    """A folder of features, or of anything else that is written shard by shard.

    Attributes:
        settings: all that they depend on, JSON; empty before `begin`.
        num_shards: in how many shards the set is written.

    Args:
        path: of the folder.
        num_shards: in how many shards the set is written.
        form: what the manifest says of the format.
        holds: what the folder holds, in messages.
        repairs: whether a finished folder that has lost an array is made unfinished; else refused.
        beside: key of the manifest of a file beside the arrays, which is repaired likewise.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_shards: int,
        form: str = FORMAT,
        holds: str = "features",
        repairs: bool = False,
        beside: str = "",
    ) -> None:
        self.path, self.num_shards = path, num_shards
        self._form, self._holds = form, holds
        self._repairs, self._beside = repairs, beside
        self.settings: Mapping[str, Any] = {}
        self._lock: IO[str] | None = None

    def begin(self, settings: Mapping[str, Any]) -> list[int]:
        """Take the folder for this work, and return the shards that it lacks.

        Args:
            settings: all that the features depend on, JSON.

        Raises:
            OutputError: it holds something else, or another process writes to it.
            OSError: it cannot be written.
        """
        self.settings = settings
        self.path.mkdir(parents=True, exist_ok=True)
        others = [name for name in os.listdir(self.path) if not _is_hidden_ours(name)]
        kept = self._settings()
        if kept is None and others:
            raise OutputError(
                f"{self.path} holds other files ({min(others)}): choose another folder"
            )
        if changed := [] if kept is None else differences(kept, settings):
            raise OutputError(
                f"{self.path} holds other {self._holds}: {said(changed, kept, settings)}. Choose"
                " another folder, or remove this one"
            )
        self._lock = try_lock(self.path / LOCK)
        if self._lock is None:
            raise OutputError(f"{self.path}: another process is writing {self._holds} there")
        if (manifest := self.manifest()) is not None:
            if self._repairs and self._is_damaged(manifest):
                self._reopen(manifest["shards"])
            else:
                self._require_arrays(manifest["shards"])
                self._clean()  # it may have ended before
                return []
        _write(self.path / UNFINISHED, [json.dumps(settings)])
        return [shard for shard in range(self.num_shards) if not self._is_whole(shard)]

    def array(self, feature: str, shard: int) -> Path:
        """Path of the array of a feature for one shard."""
        return self.path / f"{feature}-{shard:05d}.npy"

    def add(self, shard: int, record: Record) -> None:
        """Declare a shard finished, once its arrays are in place."""
        _write(self._record(shard), [json.dumps(record)])

    def records(self) -> Iterator[Record]:
        """The record of every shard, in order.

        Raises:
            RunFailedError: one is not here, as another rank has written it elsewhere.
        """
        for path in map(self._record, range(self.num_shards)):
            if not path.exists():
                raise RunFailedError(
                    f"{path} is missing: all ranks must see one folder. Name one on a file system"
                    " that all nodes share"
                )
            yield json.loads(path.read_bytes())

    def finish(self, about: Mapping[str, object]) -> None:
        """Write the manifest: `about`, and the records, a line each; then remove these."""

        def lines() -> Iterator[str]:
            yield "{\n"
            for key, value in about.items():
                yield f' "{key}": {json.dumps(value)},\n'
            yield ' "shards": [\n'
            for number, record in enumerate(self.records(), 1):
                yield f"  {json.dumps(record)}{',' * (number < self.num_shards)}\n"
            yield " ]\n}\n"

        _write(self.path / MANIFEST, lines())
        self._clean()

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished folder, which `begin` has read; else None."""
        try:
            loaded: dict[str, Any] = json.loads((self.path / MANIFEST).read_bytes())
        except FileNotFoundError:
            return None
        return loaded

    def release(self) -> None:
        """Let other processes write to the folder."""
        if self._lock is not None:
            with contextlib.suppress(FileNotFoundError):
                (self.path / LOCK).unlink()
            self._lock.close()

    def _settings(self) -> object:
        """What the folder was begun with; None if it was not begun by this command."""
        with contextlib.suppress(OSError, ValueError):
            loaded = json.loads((self.path / MANIFEST).read_bytes())
            is_ours = isinstance(loaded, dict) and loaded.get("format") == self._form
            return loaded.get("settings") if is_ours else None
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.path / UNFINISHED).read_bytes())
        return None

    def _reopen(self, records: Iterable[Record]) -> None:
        """Make a finished folder an unfinished one; if it is interrupted, it is still finished."""
        for shard, record in enumerate(records):
            self.add(shard, record)
        _write(self.path / UNFINISHED, [json.dumps(self.settings)])
        (self.path / MANIFEST).unlink()

    def _is_damaged(self, manifest: Mapping[str, Any]) -> bool:
        """Whether a finished folder has lost an array, or the file beside them is another."""
        beside = manifest.get(self._beside)
        if beside is not None and (
            self._is_changed(beside) or sha256(self.path / beside["file"]) != beside["sha256"]
        ):
            return True
        return any(map(self._changed_array, manifest["shards"]))

    def _is_whole(self, shard: int) -> bool:
        """Whether a shard has a record, and the arrays of it."""
        try:
            return self._changed_array(json.loads(self._record(shard).read_bytes())) is None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False

    def _require_arrays(self, records: Iterable[Record]) -> None:
        """Refuse a finished folder that has lost an array."""
        for record in records:
            if (name := self._changed_array(record)) is not None:
                raise OutputError(
                    f"{self.path / name} is missing or has another size than {MANIFEST} says:"
                    " remove this folder, or choose another one"
                )

    def _changed_array(self, record: Record) -> str | None:
        """The file of an array that is not there as it was written; None if all are."""
        for array in record["arrays"].values():
            if self._is_changed(array):
                return str(array["file"])
        return None

    def _is_changed(self, entry: Mapping[str, Any]) -> bool:
        """Whether a file is missing, or has another size than when it was written."""
        path = self.path / entry["file"]
        return not path.exists() or bool(path.stat().st_size != entry["bytes"])

    def _record(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.json"

    def _clean(self) -> None:
        """Remove what only an unfinished folder needs."""
        for shard in range(self.num_shards):
            self._record(shard).unlink(missing_ok=True)
        (self.path / UNFINISHED).unlink(missing_ok=True)
        for left in self.path.glob(".*.part"):  # of a process that was killed
            left.unlink()


def _is_hidden_ours(name: str) -> bool:
    """Whether a file is the lock, or what a kill left of a file that was being written."""
    return name == LOCK or (name.startswith(".") and name.endswith(".part"))


def said(changed: list[str], kept: object, now: object) -> str:
    """`crop is 224 there and 448 now` of each."""
    return "; ".join(
        f"{name} is {_at(kept, name)} there and {_at(now, name)} now" for name in changed
    )


def _at(value: object, name: str) -> str:
    """An entry of nested mappings, as JSON; long ones are cut."""
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _write(path: Path, lines: Iterable[str]) -> None:
    """Write a text file whole or not at all, and flush it to the disk."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", encoding="ascii") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
