"""Names of files and tensors of a checkpoint, and where the newest one is."""

from pathlib import Path

FORMAT = 1
MASTER, EMA = "master", "ema"
STATE_FILE, SHARED_FILE = "state.json", "shared.safetensors"


def directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def shard_file(rank: int) -> str:
    """Name of one rank's file."""
    return f"shard_{rank:05d}.safetensors"


def checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step_????????"))
