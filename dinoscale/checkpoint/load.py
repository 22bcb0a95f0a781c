"""Read a checkpoint: ranges of named tensors out of all ranks' files, at any world size."""

import json
import logging
from collections.abc import Callable, Sequence
from operator import index
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dinoscale.checkpoint.layout import EMA, FORMAT, MASTER, SHARED_FILE, STATE_FILE, checkpoints
from dinoscale.checkpoint.progress import Progress, read_measured
from dinoscale.checkpoint.sums import read_sums, verify
from dinoscale.errors import CheckpointError

log = logging.getLogger(__name__)

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
        names = sorted(read_sums(path))
        try:
            self.state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
            if self.state["format"] != FORMAT:
                raise CheckpointError(
                    f"{path}: format {self.state['format']}, this version reads {FORMAT}"
                )
            self.shared = load_file(path / SHARED_FILE)
            self._files = [
                safe_open(path / name, framework="pt")
                for name in names
                if name.startswith("shard_")
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
    def progress(self) -> Progress:
        """How far the run had come.

        Raises:
            CheckpointError: state.json says other things about it than this version.
        """
        try:
            progress = Progress(**self.state["progress"])
        except TypeError as error:
            raise CheckpointError(f"{self.path / STATE_FILE}: progress: {error}") from error
        top1 = read_measured(self.path)
        if top1 is not None:
            progress.measured(top1)
        return progress

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

    def kinds(self) -> dict[str, list[str]]:
        """Kind ("master", "ema", moments of the optimizer) -> names of its tensors."""
        found: dict[str, list[str]] = {}
        for key in sorted(self._pieces):
            kind, name = key.split("/", 1)
            found.setdefault(kind, []).append(name)
        return found

    def numel(self, name: str) -> int:
        """Elements of a parameter."""
        return torch.Size(self.shapes[name]).numel()

    def full(self, kind: str) -> dict[str, Tensor]:
        """Every tensor of a kind (`MASTER`, `EMA`) in full, float32, on the CPU."""
        self._require_elements()  # before memory is taken for more than the files hold
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

    def require(
        self, shapes: dict[str, tuple[int, ...]], shared: dict[str, tuple[int, ...]]
    ) -> None:
        """Refuse a checkpoint of another network, or one with a shard missing.

        Args:
            shapes: parameter name -> full shape.
            shared: the same of what `shared` has to hold.

        Raises:
            CheckpointError: naming the first differences.
        """
        there = self.shapes | {name: tuple(value.shape) for name, value in self.shared.items()}
        here = shapes | shared
        differences = [
            f"{name} is {_text(there.get(name))} there and {_text(here.get(name))} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"{self.path} is a checkpoint of another model ({len(differences)} of"
                f" {len(there)} tensors differ): {'; '.join(differences[:3])}."
                " Choose another run_dir, or the configuration the run was started with"
            )

        self._require_elements()

    def _require_elements(self) -> None:
        for kind in (MASTER, EMA):
            for name, shape in self.shapes.items():
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
    mappings = [state[name] for name in ("config", "plan", "progress", "optimizer_steps")]
    if type(state["step"]) is not int or not all(isinstance(m, dict) for m in mappings):
        raise ValueError(f"{STATE_FILE} needs a whole number as step and mappings as config etc.")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{STATE_FILE} holds a shape that is none")


def first_good(
    found: Sequence[Path], open_one: Callable[[Path], Checkpoint]
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """Open the first checkpoint that can be used, and say what is wrong with those before it.

    Args:
        found: step_* directories, the preferred one first.
        open_one: opens one or raises CheckpointError.

    Raises:
        CheckpointError: there are some, and none can be used.
    """
    errors: list[CheckpointError] = []
    for path in found:
        try:
            return open_one(path), errors
        except CheckpointError as error:  # noqa: PERF203  # a few paths, once a start
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise CheckpointError(
            f"none of the {len(errors)} checkpoints in {found[0].parent} can be used: "
            + "; ".join(str(error) for error in errors[:3])
        )
    return None, []


def open_verified(path: Path, *, share: int = 0, num_shares: int = 1) -> Checkpoint:
    """Open a step_* directory after comparing this share of its files with their checksums.

    Raises:
        CheckpointError: it is damaged or incomplete.
    """
    verify(path, share=share, num_shares=num_shares)
    return Checkpoint(path)


def open_run(path: Path) -> Checkpoint:
    """Open a checkpoint directory, or the newest undamaged checkpoint of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    found = [path] if (path / STATE_FILE).exists() else checkpoints(path)[::-1]
    checkpoint, errors = first_good(found, open_verified)
    for error in errors:
        log.warning("%s; using an older one", error)
    if checkpoint is None:
        raise CheckpointError(f"no checkpoint in {path}: give a run directory or one of its step_*")
    return checkpoint


def _text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))


__all__ = ["EMA", "MASTER", "Checkpoint", "first_good", "open_run", "open_verified"]
