"""The folder that `dinoscale data cluster` writes, and its reader.

`level-L.json` is written last of a level, after its arrays, and `manifest.json` last of all: a
folder without it is unfinished. `state.npz` holds the centroids of the last iteration.

Shape letters: N images, K clusters of a level, D width.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_tools.curation.embeddings import Embeddings, open_embeddings
from data_tools.journal import Json
from dinoscale.errors import DataError, OutputError
from dinoscale.evaluate.embedding.array_file import ArrayFile
from dinoscale.runtime.fingerprint import differences
from dinoscale.runtime.locks import try_lock
from dinoscale.runtime.outputs import replace_text, sha256

FORMAT = "dinoscale clusters 1"
MANIFEST = "manifest.json"

_UNFINISHED = "unfinished.json"  # what the clusters depend on, until there is a manifest
_LOCK = ".lock"
_STATE = "state.npz"


@dataclass(frozen=True, eq=False)
class State:
    """Where an unfinished k-means stands.

    Attributes:
        level: from 1.
        step: of the resampling; 0 is the k-means on all points.
        iterations: done so far.
        done: whether it needs no more of them.
        centroids: (K, D) float32.
    """

    level: int
    step: int
    iterations: int
    done: bool
    centroids: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Level:
    """A finished level.

    Attributes:
        about: its record, JSON: `clusters`, `points`, `inertia` and more.
        centroids: (K, D) float32; no cluster is empty.
        assignments: cluster of each point, which is an image at level 1 and a cluster of the level
            below at others, int32.
        distances: of each point to its centroid, Euclidean, float32.
    """

    about: Json
    centroids: NDArray[np.float32]
    assignments: NDArray[np.int32]
    distances: NDArray[np.float32]


class ClusterFolder:
    """A folder of clusters that is being written.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def begin(self, work: Mapping[str, object]) -> Json | None:
        """Take the folder for this work.

        Args:
            work: fingerprint of all that the clusters depend on.

        Returns:
            The manifest, if the folder is finished.

        Raises:
            OutputError: it holds something else, or another process writes to it.
            OSError: it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        others = [name for name in os.listdir(self.path) if not name.startswith(".")]
        manifest = _json_of(self.path / MANIFEST)
        kept = _json_of(self.path / _UNFINISHED) if manifest is None else manifest.get("work")
        if kept is None and others:
            raise OutputError(
                f"{self.path} holds other files ({min(others)}): choose another folder"
            )
        if kept is not None and (changed := differences(kept, work)):
            raise OutputError(
                f"{self.path} holds clusters of other work, different in {', '.join(changed)}:"
                " choose another folder, or remove this one"
            )
        self._lock = try_lock(self.path / _LOCK)
        if self._lock is None:
            raise OutputError(f"{self.path}: another process is writing clusters there")
        if manifest is None:
            replace_text(self.path / _UNFINISHED, json.dumps(work))
        else:
            self._clean()  # it may have ended before
        return manifest

    def state(self) -> State | None:
        """The last state, None before the first."""
        try:
            with np.load(self.path / _STATE) as file:
                level, step, iterations, done = file["where"].tolist()
                return State(level, step, iterations, bool(done), file["centroids"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{self.path / _STATE} is damaged ({error}): remove it, and the level begins anew"
            ) from error

    def keep(self, state: State) -> None:
        """Replace the state, whole or not at all."""
        beside = self.path / f".{_STATE}.part"
        where = np.array([state.level, state.step, state.iterations, state.done], dtype=np.int64)
        with beside.open("wb") as file:
            np.savez(file, where=where, centroids=state.centroids)
        os.replace(beside, self.path / _STATE)

    def sample(self, level: int, step: int) -> NDArray[np.int64] | None:
        """The points of a step of resampling, as they were kept; None before that."""
        path = self._sample(level, step)
        numbers: NDArray[np.int64] | None = np.load(path) if path.exists() else None
        return numbers

    def keep_sample(self, level: int, step: int, numbers: NDArray[np.int64]) -> None:
        """Keep the points of a step, and forget those of others."""
        _write(self._sample(level, step), numbers)
        for path in self.path.glob("sample-*.npy"):
            if path != self._sample(level, step):
                path.unlink()

    def level(self, number: int) -> Level | None:
        """A level, None if it is not finished.

        Raises:
            DataError: an array of it is damaged.
        """
        about = _json_of(self.path / f"level-{number}.json")
        return None if about is None else _level(self.path, number, about)

    def add(self, number: int, level: Level) -> None:
        """Write a level, its record last."""
        arrays = {
            "centroids": level.centroids,
            "assignments": level.assignments,
            "distances": level.distances,
        }
        written = {}
        for name, array in arrays.items():
            path = self.path / f"{name}-{number}.npy"
            _write(path, array)
            written[name] = {"file": path.name, "sha256": sha256(path)}
        record = {**level.about, "arrays": written}
        replace_text(self.path / f"level-{number}.json", json.dumps(record))

    def finish(self, about: Mapping[str, object]) -> None:
        """Write the manifest, and remove what only an unfinished folder needs."""
        replace_text(self.path / MANIFEST, json.dumps({"format": FORMAT, **about}, indent=1))
        self._clean()

    def release(self) -> None:
        """Let other processes write to the folder."""
        if self._lock is not None:
            with suppress(FileNotFoundError):
                (self.path / _LOCK).unlink()
            self._lock.close()

    def _sample(self, level: int, step: int) -> Path:
        return self.path / f"sample-{level}-{step}.npy"

    def _clean(self) -> None:
        for name in (_UNFINISHED, _STATE):
            (self.path / name).unlink(missing_ok=True)
        for pattern in ("sample-*.npy", "level-*.json", ".*.part"):
            for path in self.path.glob(pattern):
                path.unlink()


@dataclass(frozen=True, eq=False)
class Clusters:
    """A finished folder.

    Attributes:
        path: of the folder.
        about: its manifest.
    """

    path: Path
    about: Json
    _compared: set[int] = field(default_factory=set)  # levels whose checksums were compared

    @property
    def num_levels(self) -> int:
        """Levels, of which 1 has the most clusters."""
        return len(self.about["levels"])

    def level(self, number: int) -> Level:
        """A level; its assignments and distances are memory-mapped.

        The first call for a level compares its arrays with their SHA-256, which reads them.

        Raises:
            DataError: an array of it is damaged.
        """
        about = self.about["levels"][number - 1]
        if number not in self._compared:
            for of in about["arrays"].values():
                _require_same(self.path / of["file"], of["sha256"])
            self._compared.add(number)
        return _level(self.path, number, about)

    def of_images(self, number: int) -> NDArray[np.int32]:
        """The cluster at a level of each image, (N,)."""
        found: NDArray[np.int32] = np.array(self.level(1).assignments)
        for above in range(2, number + 1):
            found = self.level(above).assignments[found]
        return found

    def embeddings(self, path: Path | None = None) -> Embeddings:
        """The embeddings that were clustered.

        Args:
            path: where they lie now; None: where they lay then.

        Raises:
            DataError: they are gone, or others.
        """
        of = self.about["embeddings"]
        place = Path(of["path"]) if path is None else path
        found = open_embeddings(place, features=of["features"], normalize=of["normalized"])
        if found.digest != of["digest"]:
            raise DataError(
                f"{place} holds other embeddings than {self.path} was made of. Cluster them, or"
                " name those with --embeddings"
            )
        return found


def open_clusters(path: Path) -> Clusters:
    """Open a finished folder of clusters.

    Raises:
        DataError: it is none, or unfinished.
    """
    about = _json_of(path / MANIFEST)
    if about is not None and about.get("format") == FORMAT:
        return Clusters(path, about)
    if (path / _UNFINISHED).exists():
        raise DataError(
            f"{path} is unfinished: start the same `dinoscale data cluster` again, which completes"
            " it"
        )
    raise DataError(f"{path} is no folder of clusters: make one with `dinoscale data cluster`")


def _level(path: Path, number: int, about: Json) -> Level:
    arrays = {name: _array(path / of["file"]) for name, of in about["arrays"].items()}
    level = Level(about, np.array(arrays["centroids"]), arrays["assignments"], arrays["distances"])
    sizes = len(level.centroids), len(level.assignments), len(level.distances)
    if sizes != (about["clusters"], about["points"], about["points"]):
        raise DataError(f"level {number} of {path} is damaged: remove the folder, and cluster anew")
    return level


def _require_same(path: Path, recorded: str) -> None:
    """Refuse an array that has changed since it was written."""
    try:
        same = sha256(path) == recorded
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}): start again when it can be read"
        ) from error
    if not same:
        raise DataError(
            f"{path} is damaged: its SHA-256 is not that of {MANIFEST}. Remove the folder, and"
            " cluster anew"
        )


def _array(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        why = f"cannot read {path} ({error})"
        raise DataError(f"{why}: remove the folder, and cluster anew") from error
    return array


def _json_of(path: Path) -> Json | None:
    """The object in a file; None if there is no file, or no object in it."""
    try:
        loaded = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _write(path: Path, array: NDArray[Any]) -> None:
    """Write an array whole or not at all."""
    with ArrayFile(path, dtype=array.dtype, row_shape=array.shape[1:]) as file:
        file.append(array)
