"""Read a checkpoint: ranges of named tensors from all ranks' files, at any world size."""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dinoscale.checkpoint.checksums import read_sums, verify
from dinoscale.checkpoint.index import ShardIndex, index_from_bytes, index_of_headers
from dinoscale.checkpoint.layout import (
    ANCHOR,
    EMA,
    FORMAT,
    GRAM,
    INDEX_FILE,
    MASTER,
    MEASURED_FILE,
    SHARD_PREFIX,
    SHARED_FILE,
    STATE_FILE,
    checkpoints,
    is_checkpoint,
    named_step,
    phase_directories,
    run_with_checkpoints,
)
from dinoscale.checkpoint.progress import Progress, read_guarded, read_measured
from dinoscale.checkpoint.read_errors import with_retries
from dinoscale.checkpoint.shard_files import ShardFiles
from dinoscale.config.renamed import with_new_names
from dinoscale.errors import CheckpointError, UnreadableError

log = logging.getLogger(__name__)

# Settings that name weights which those of a run derive from.
_DERIVED_FROM = (
    *(("train", "init_from"), ("train", "continue_from")),
    *(("gram", "teacher"), ("distill", "teacher"), ("distill", "targets")),
)
_DAMAGES = (  # what parsing a damaged or foreign file can raise
    ValueError,
    OverflowError,
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
    SafetensorError,
)


class Checkpoint:
    """An open checkpoint; reading it unpickles nothing.

    Opening reads the small files; shards are read lazily, only the requested elements. Picklable:
    rank 0 opens a checkpoint and sends it to the other ranks, which open the shards they need.

    Attributes:
        path: the step_* directory.
        state: contents of state.json; settings that were renamed have their new names.
        shared: center and buffers by name, on the CPU.
        measured: k-NN accuracy added after the save, in percent; None if none was added.
        guarded: what the guard measured after the save; None if nothing was added.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, a step_* directory.

        Raises:
            MissingFileError: a file is missing.
            UnreadableError: a file cannot be read, or has the format of another version.
            CheckpointError: a file is damaged.
        """
        self.path = path
        names = sorted(read_sums(path))
        try:
            self.state: dict[str, Any] = json.loads(self._read(STATE_FILE))
            if self.state["format"] != FORMAT:
                raise UnreadableError(
                    f"{path} has format {self.state['format']}, and this version reads {FORMAT}:"
                    " resume with the version that wrote it, or choose another run_dir"
                )
            _check_state(self.state)
            self.state["config"] = with_new_names(self.state["config"])
            self.shared = safetensors.torch.load(self._read(SHARED_FILE))
            self._index = self._open_index(names)
        except _DAMAGES as error:
            raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error
        self._files = ShardFiles(path)
        self.measured = with_retries(lambda: read_measured(path), path / MEASURED_FILE)
        self.guarded = with_retries(lambda: read_guarded(path), path / MEASURED_FILE)

    def _read(self, name: str) -> bytes:
        return with_retries((self.path / name).read_bytes, self.path / name)

    def _open_index(self, names: Sequence[str]) -> ShardIndex:
        """Open the index, and check that all files are as long as it says."""
        shards = [name for name in names if name.startswith(SHARD_PREFIX)]
        if INDEX_FILE in names:
            found = index_from_bytes(self._read(INDEX_FILE))
        else:  # older versions wrote none
            found = index_of_headers(self.path, shards)
        if sorted(found.files) != shards:
            raise ValueError(f"{INDEX_FILE} names other files than there are")
        paths = [self.path / name for name in found.files]
        found.require_within([with_retries(path.stat, path).st_size for path in paths])
        return found

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    @property
    def progress(self) -> Progress:
        """Progress of the run when it was saved.

        Raises:
            CheckpointError: state.json has other fields for it than this version.
        """
        try:
            progress = Progress(**self.state["progress"])
        except TypeError as error:
            raise CheckpointError(f"{self.path / STATE_FILE}: progress: {error}") from error
        if self.measured is not None:
            progress.measured(self.measured)
        progress.guarded = self.guarded or progress.guarded
        return progress

    @property
    def knn_top1(self) -> float | None:
        """K-NN accuracy at the checkpoint's step, in percent; None if not measured."""
        saved: float | None = self.state["progress"].get("knn_top1")
        return saved if self.measured is None else self.measured

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> full shape."""
        return {name: tuple(shape) for name, shape in self.state["shapes"].items()}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements start..start+numel of a flattened tensor, (numel,) float32.

        Raises:
            CheckpointError: some of them are in no file or cannot be read.
        """
        kind = self._stored_as(kind, name)
        result = torch.empty(numel)
        values, found = result.numpy(), 0
        for first, count, file, offset in self._index.find(f"{kind}/{name}", start, start + numel):
            low, high = max(start, first), min(start + numel, first + count)
            if low < high:
                piece = values[low - start : high - start]
                self._files.fill(piece, file, offset=offset + values.itemsize * (low - first))
                found += high - low
        self._require_all(kind, name, found, numel)
        return result

    def kinds(self) -> dict[str, list[str]]:
        """Kind ("master", "ema", the optimizer's moments) -> names of its tensors."""
        found: dict[str, list[str]] = {}
        for key in self._index.spans:
            kind, name = key.split("/", 1)
            found.setdefault(kind, []).append(name)
        return found

    def numel(self, name: str) -> int:
        """Number of elements of a parameter."""
        return torch.Size(self.shapes[name]).numel()

    def full(self, kind: str, heartbeat: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """Every tensor of a kind (`MASTER`, `EMA`) in full, float32, on the CPU.

        `heartbeat` is called after every piece that is read.
        """
        self._require_elements()  # before allocating memory for more than the files hold
        whole = {
            name: torch.empty(torch.Size(shape).numel()) for name, shape in self.shapes.items()
        }
        pieces = [
            (file, offset, name, first, count)
            for name, values in whole.items()
            for first, count, file, offset in self._index.find(
                f"{self._stored_as(kind, name)}/{name}", 0, len(values)
            )
        ]
        for file, offset, name, first, count in sorted(pieces):  # each file once, front to back
            self._files.fill(whole[name].numpy()[first : first + count], file, offset=offset)
            heartbeat()
        return {name: values.view(self.shapes[name]) for name, values in whole.items()}

    def buffers(self, owner: str) -> dict[str, Tensor]:
        """Buffers of `owner`, "student" or "teacher", by name."""
        prefix = f"{owner}/"
        return {
            name.removeprefix(prefix): value
            for name, value in self.shared.items()
            if name.startswith(prefix)
        }

    def require(
        self,
        shapes: dict[str, tuple[int, ...]],
        shared: dict[str, tuple[int, ...]],
        frozen: Collection[str] = (),
    ) -> None:
        """Refuse a checkpoint of another network, or one with a missing shard.

        Args:
            shapes: parameter name -> full shape.
            shared: name -> shape of each tensor that `shared` has to hold.
            frozen: names of the parameters that do not train.

        Raises:
            CheckpointError: the first differences, or missing elements.
        """
        saved = self.shapes | {name: tuple(value.shape) for name, value in self.shared.items()}
        needed = shapes | shared
        differences = [
            f"{name} is {_text(saved.get(name))} there and {_text(needed.get(name))} here"
            for name in sorted(saved.keys() | needed.keys())
            if saved.get(name) != needed.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"{self.path} is a checkpoint of another model ({len(differences)} of"
                f" {len(saved)} tensors differ): {'; '.join(differences[:3])}."
                " Choose another run_dir, or the configuration the run was started with"
            )
        others = sorted(self.frozen.symmetric_difference(frozen))
        if others:
            raise CheckpointError(
                f"{self.path} is of a run in which other tensors train ({len(others)} differ, such"
                f" as {others[0]}): keep lora.* and optim.trained_blocks, or take the weights alone"
                " with train.init_from"
            )
        self._require_elements()

    @property
    def gram_refreshes(self) -> int | None:
        """Refreshes of the Gram network so far; None if it has no weights here."""
        refreshes: int | None = self.state.get("gram_refreshes")  # older versions saved none
        return refreshes

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that do not train; student and teacher have the same."""
        return frozenset(self.state.get("frozen", ()))  # older versions had none

    def _stored_as(self, kind: str, name: str) -> str:
        """The kind under which a parameter is stored: once, if both networks have the same."""
        return MASTER if kind in (EMA, ANCHOR) and name in self.frozen else kind

    @property
    def has_anchor(self) -> bool:
        """Whether the weights of an anchor are here."""
        return bool(self.state.get("anchor", False))  # older versions saved none

    @property
    def frozen_teacher(self) -> str | None:
        """Digest of the frozen teacher's weights, which are not here; None without one."""
        identity: str | None = self.state.get("frozen_teacher")  # older versions had none
        return identity

    @property
    def licence(self) -> str | None:
        """What is known of the licence of weights that these derive from; None if of none."""
        if "licence" in self.state:
            noted: str | None = self.state["licence"]
            return noted
        config = self.state["config"]  # of an older version, which noted none
        named = [config.get(section, {}).get(key) for section, key in _DERIVED_FROM]
        names = [Path(path).name for path in named if path is not None]
        return f"Not recorded (the run began with {' and '.join(names)})." if names else None

    def _require_elements(self) -> None:
        of_backbone = {n: s for n, s in self.shapes.items() if n.startswith("backbone.")}
        kinds = {MASTER: self.shapes, EMA: self.shapes}
        if self.gram_refreshes is not None:
            kinds[GRAM] = of_backbone
        if self.has_anchor:
            kinds[ANCHOR] = of_backbone
        for kind, shapes in kinds.items():
            for name, shape in shapes.items():
                found = self._index.numel(f"{self._stored_as(kind, name)}/{name}")
                self._require_all(kind, name, found, torch.Size(shape).numel())

    def _require_all(self, kind: str, name: str, found: int, numel: int) -> None:
        if found != numel:
            raise CheckpointError(
                f"{self.path}: {found} of {numel} elements of {kind} {name} found;"
                " a shard file is missing, use an earlier checkpoint"
            )


def _check_state(state: dict[str, Any]) -> None:
    """Raise ValueError if a field that every reader relies on has another type."""
    sizes = [size for shape in state["shapes"].values() for size in shape]
    mappings = [state[name] for name in ("config", "plan", "progress", "optimizer_steps")]
    if type(state["step"]) is not int or not all(isinstance(m, dict) for m in mappings):
        raise ValueError(f"{STATE_FILE} needs an integer step and mappings for config etc.")
    if state["progress"].get("step", state["step"]) != state["step"]:
        raise ValueError(f"{STATE_FILE} names two different steps")
    if type(state.get("gram_refreshes", 0)) not in (int, type(None)):
        raise ValueError(f"{STATE_FILE} needs a whole number of refreshes of the Gram network")
    frozen = state.get("frozen", [])
    if not isinstance(frozen, list) or not set(frozen) <= state["shapes"].keys():
        raise ValueError(f"{STATE_FILE} names frozen parameters that there are not")
    if type(state.get("anchor", False)) is not bool:
        raise ValueError(f"{STATE_FILE} needs to say whether there is an anchor, true or false")
    if not isinstance(state.get("frozen_teacher"), str | None):
        raise ValueError(f"{STATE_FILE} needs a digest of the frozen teacher, or null")
    if not isinstance(state.get("licence"), str | None):
        raise ValueError(f"{STATE_FILE} needs a text on the licence, or null")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{STATE_FILE} holds an invalid shape")


def first_usable(
    found: Sequence[Path], open_one: Callable[[Path], Checkpoint]
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """Open the first usable checkpoint; also return the errors of those before it.

    Args:
        found: step_* directories, the preferred one first.
        open_one: opens one or raises CheckpointError.

    Raises:
        UnreadableError: one cannot be read now, which may pass.
        CheckpointError: there are checkpoints, and none is usable.
    """
    errors: list[CheckpointError] = []
    for path in found:
        try:
            return open_one(path), errors
        except UnreadableError:  # noqa: PERF203  # an older one would lose steps
            raise
        except CheckpointError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise CheckpointError(
            f"none of the {len(errors)} checkpoints in {found[0].parent} is usable: "
            + "; ".join(str(error) for error in errors[:3])
        )
    return None, []


def held_step(path: Path) -> int:
    """The step that a step_* directory holds: that of state.json, if its checksum matches.

    Raises:
        UnreadableError: its state cannot be read, so it may hold any step.
    """
    named = named_step(path)
    assert named is not None
    try:
        data = with_retries((path / STATE_FILE).read_bytes, path / STATE_FILE)
        step = json.loads(data)["step"]
        if type(step) is not int or step == named:
            return named
        intact = read_sums(path)[STATE_FILE] == hashlib.sha256(data).hexdigest()
    except UnreadableError:
        raise
    except (CheckpointError, *_DAMAGES):
        return named
    return step if intact else named


def newest_first(run_dir: Path) -> list[Path]:
    """All checkpoints of a run by the steps they hold; of two equal ones, the one so named first.

    Raises:
        UnreadableError: they cannot be listed, or the state of one cannot be read.
    """

    def order(path: Path) -> tuple[int, bool]:
        held, named = held_step(path), named_step(path)
        if held != named:
            log.warning("%s holds step %d by its state.json, which counts", path, held)
        return held, held == named

    return sorted(checkpoints(run_dir), key=order, reverse=True)


def open_verified(path: Path, heartbeat: Callable[[], None] = lambda: None) -> Checkpoint:
    """Open a step_* directory after comparing its files with their checksums.

    `heartbeat` is called regularly.

    Raises:
        UnreadableError: it cannot be read, though it may be intact.
        CheckpointError: it is damaged or incomplete.
    """
    verify(path, heartbeat=heartbeat)
    return Checkpoint(path)


def open_run(path: Path, heartbeat: Callable[[], None] = lambda: None) -> Checkpoint:
    """Open a checkpoint directory, or the newest undamaged checkpoint of a run directory.

    The newest is the one that holds the highest step, whatever its name; of a run of several
    phases, the newest of the last one, and a warning names others that lead to no later one.
    `heartbeat` is called regularly while checksums are compared.

    Raises:
        UnreadableError: the newest cannot be read or determined.
        CheckpointError: there is none.
    """
    found = [path]
    if not is_checkpoint(path):
        run = run_with_checkpoints(path)
        found = newest_first(run)
        _name_other_ends(path, taken=run)
    checkpoint, errors = first_usable(found, lambda one: open_verified(one, heartbeat))
    for error in errors:
        log.warning("%s; using an older one", error)
    if checkpoint is None:
        raise CheckpointError(f"no checkpoint in {path}: give a run directory or one of its step_*")
    return checkpoint


def _name_other_ends(run_dir: Path, *, taken: Path) -> None:
    """Warn where a run has other phases than the one taken at whose end none begins."""
    found = [phase for phase in phase_directories(run_dir) if checkpoints(phase)]
    try:
        before = {_begun_at(phase) for phase in found}
    except (OSError, *_DAMAGES):  # of a damaged checkpoint nobody knows where it began
        return
    ends = [phase for phase in found if phase.name not in before and phase != taken]
    if ends:
        log.warning(
            "%s has several phases that lead to no other: taking the last, %s; give %s for another",
            *(run_dir, taken.name, " or ".join(map(str, ends))),
        )


def _begun_at(phase: Path) -> str:
    """Name of the folder at whose checkpoint a phase began; empty for the first."""
    train = json.loads((checkpoints(phase)[-1] / STATE_FILE).read_bytes())["config"]["train"]
    return Path(train["continue_from"] or train["init_from"] or "").name


def _text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))


__all__ = ["EMA", "MASTER", "Checkpoint", "first_usable", "open_run", "open_verified"]
