"""Names of a checkpoint's files and tensors, and the list of a run's checkpoints."""

import re
from pathlib import Path

from dinoscale.checkpoint.read_errors import names_in
from dinoscale.runtime.outputs import PHASES

FORMAT = 2
_PHASE = re.compile(r"[0-9]+_[a-z0-9_]+")  # names of folders, as `config.phases` gives them
MASTER, EMA = "master", "ema"
GRAM = "gram"  # of the backbone's tensors alone, where there is a Gram network
ANCHOR = "anchor"  # likewise, where there is an anchor
STATE_FILE, SHARED_FILE, SUMS_FILE = "state.json", "shared.safetensors", "SHA256SUMS"
MEASURED_FILE = "measured.json"
START_FILE = "guard_start.safetensors"  # in the run directory: neighbours of the guard's start
INDEX_FILE, SHARD_PREFIX = "shards.index", "shard_"


def directory(run_dir: Path, step: int) -> Path:
    """Directory of the checkpoint after `step` optimizer steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def shard_file(rank: int) -> str:
    """Name of one rank's file."""
    return f"{SHARD_PREFIX}{rank:05d}.safetensors"


def part_of(target: Path) -> Path:
    """Directory in which a checkpoint is written before it is renamed to `target`."""
    return target.with_name(f".{target.name}.part")


def removed_of(target: Path) -> Path:
    """New name of a checkpoint before it is deleted, so that no partial one looks complete."""
    return target.with_name(f".{target.name}.removed")


def checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, sorted by the steps in their names.

    Raises:
        UnreadableError: their folder cannot be listed.
    """
    folder = run_dir / "checkpoints"
    found = (folder / name for name in names_in(folder) if name.startswith("step_"))
    return sorted((path for path in found if named_step(path) is not None), key=_order)


def not_resumed(run_dir: Path) -> str:
    """Why a run that may not resume does not start where there is one."""
    return (
        f"{run_dir} already holds a run and resume is false; choose another run_dir, or delete that"
        " one"
    )


def run_with_checkpoints(run_dir: Path) -> Path:
    """The directory itself; of a run of several phases, that of its last one with a checkpoint.

    Raises:
        UnreadableError: a folder cannot be listed.
    """
    for phase in reversed(phase_directories(run_dir)):
        if checkpoints(phase):
            return phase
    return run_dir


def phase_directories(run_dir: Path) -> list[Path]:
    """Directories of the phases of a run that have begun, in order; none for a run of one part.

    Raises:
        UnreadableError: their folder cannot be listed.
    """
    folder = run_dir / PHASES
    found = (folder / name for name in names_in(folder) if _PHASE.fullmatch(name))
    return sorted((path for path in found if path.is_dir()), key=_number_of_phase)


def _number_of_phase(path: Path) -> int:
    return int(path.name.partition("_")[0])


def named_step(path: Path) -> int | None:
    """The step in a directory's name; None if the name is of another form."""
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isascii() and digits.isdecimal() else None


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint, whatever its name.

    Raises:
        UnreadableError: it cannot be listed.
    """
    return STATE_FILE in names_in(path)


def _order(path: Path) -> tuple[int, str]:
    return named_step(path) or 0, path.name


def leftovers(run_dir: Path) -> list[Path]:
    """Directories left behind by interrupted saves and deletions.

    Raises:
        UnreadableError: their folder cannot be listed.
    """
    folder = run_dir / "checkpoints"
    names = [name for name in names_in(folder) if name.startswith(".step_")]
    return [folder / name for name in names if name.endswith((".part", ".removed"))]
