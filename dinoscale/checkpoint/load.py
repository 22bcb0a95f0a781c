"""Read a checkpoint: ranges of named tensors out of all ranks' files, at any world size."""

import json
from operator import index
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dinoscale.checkpoint.layout import EMA, FORMAT, MASTER, SHARED_FILE, STATE_FILE, checkpoints
from dinoscale.errors import CheckpointError

_DAMAGES = (  # how a file can fail that is cut off, or that we did not write
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
    SafetensorError,
)


class Checkpoint:
    """An open checkpoint; nothing of it is unpickled.

    Attributes:
        state: contents of state.json.
        shared: center and buffers by name, on the CPU.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, a step_* directory.

        Raises:
            CheckpointError: a file is missing or damaged, or the format is unknown.
        """
        self.path = path
        try:
            self.state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
            if self.state["format"] != FORMAT:
                raise CheckpointError(
                    f"{path}: format {self.state['format']}, this version reads {FORMAT}"
                )
            self.shared = load_file(path / SHARED_FILE)
            self._files = [
                safe_open(file, framework="pt") for file in sorted(path.glob("shard_*.safetensors"))
            ]
            self._pieces = self._index()
            _check_state(self.state)
        except _DAMAGES as error:
            raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> full shape."""
        return {name: tuple(shape) for name, shape in self.state["shapes"].items()}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements start..start+numel of a flattened tensor, (numel,) float32.

        Raises:
            CheckpointError: some of them are in no file.
        """
        result = torch.empty(numel)
        found = 0
        for first, count, file in self._pieces.get(f"{kind}/{name}", []):
            low, high = max(start, first), min(start + numel, first + count)
            if low < high:
                piece = file.get_slice(f"{kind}/{name}")[low - first : high - first]
                result[low - start : high - start] = piece
                found += high - low
        self._require_all(kind, name, found, numel)
        return result

    def full(self, kind: str) -> dict[str, Tensor]:
        """Every tensor of a kind (`MASTER`, `EMA`) in full, float32, on the CPU."""
        self.require(self.shapes)  # before memory is taken for more than the files hold
        return {
            name: self.read(kind, name, 0, torch.Size(shape).numel()).view(shape)
            for name, shape in self.shapes.items()
        }

    def buffers(self, owner: str) -> dict[str, Tensor]:
        """Buffers of `owner`, "student" or "teacher", by name."""
        prefix = f"{owner}/"
        return {
            name.removeprefix(prefix): value
            for name, value in self.shared.items()
            if name.startswith(prefix)
        }

    def require(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint of another network, or one with a shard missing.

        Raises:
            CheckpointError: naming the first differences.
        """
        own = self.shapes
        differences = [
            f"{name} is {_text(own.get(name))} there and {_text(shapes.get(name))} here"
            for name in sorted(own.keys() | shapes.keys())
            if own.get(name) != shapes.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"{self.path} is a checkpoint of another model ({len(differences)} of"
                f" {len(own)} tensors differ): {'; '.join(differences[:3])}."
                " Choose another run_dir, or the configuration the run was started with"
            )

        for kind in (MASTER, EMA):
            for name, shape in own.items():
                found = sum(count for _, count, _ in self._pieces.get(f"{kind}/{name}", []))
                self._require_all(kind, name, found, torch.Size(shape).numel())

    def _require_all(self, kind: str, name: str, found: int, numel: int) -> None:
        if found != numel:
            raise CheckpointError(
                f"{self.path}: {found} of {numel} elements of {kind} {name} found;"
                " a shard file is missing, use an earlier checkpoint"
            )

    def _index(self) -> dict[str, list[tuple[int, int, Any]]]:
        pieces: dict[str, list[tuple[int, int, Any]]] = {}
        for file in self._files:
            starts = json.loads(file.metadata()["starts"])
            for key in file.keys():  # noqa: SIM118  # not a mapping
                numel = file.get_slice(key).get_shape()[0]
                name = key.split("/", 1)[1]
                pieces.setdefault(key, []).append((index(starts[name]), numel, file))
        return pieces


def _check_state(state: dict[str, Any]) -> None:
    """Raise ValueError where what every reader relies on is of another type."""
    sizes = [size for shape in state["shapes"].values() for size in shape]
    if type(state["step"]) is not int or not isinstance(state["config"], dict):
        raise ValueError(f"{STATE_FILE} needs a whole number as step and a mapping as config")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{STATE_FILE} holds a shape that is none")


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def open_run(path: Path) -> Checkpoint:
    """Open a checkpoint directory, or the newest checkpoint of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    target = path if (path / STATE_FILE).exists() else newest(path)
    if target is None:
        raise CheckpointError(f"no checkpoint in {path}: give a run directory or one of its step_*")
    return Checkpoint(target)


def _text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))


__all__ = ["EMA", "MASTER", "Checkpoint", "newest", "open_run"]
