"""Rewrite a checkpoint with another number of shard files, on one process."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from dinoscale.checkpoint.checksums import flushed_sum, seal
from dinoscale.checkpoint.layout import (
    SHARED_FILE,
    START_FILE,
    STATE_FILE,
    directory,
    part_of,
    shard_file,
)
from dinoscale.checkpoint.load import Checkpoint, open_run
from dinoscale.checkpoint.progress import read_verdicts, write_measured
from dinoscale.errors import CheckpointError
from dinoscale.runtime.outputs import write_tensors


def reshard(run: Path, out: Path, *, num_shards: int) -> dict[str, Any]:
    """Rewrite a checkpoint with another number of shard files, into another run directory.

    Use it for fewer, larger files; a run resumes on another number of ranks without it.

    Args:
        run: a run directory (its newest undamaged checkpoint) or one of its step_*.
        out: run directory to write; a run started with it resumes from there.
        num_shards: files to write, >= 1.

    Raises:
        CheckpointError: there is no checkpoint, or `out` has this step already.
    """
    if num_shards < 1:
        raise CheckpointError(f"--shards: need at least 1, got {num_shards}")
    checkpoint = open_run(run)
    target = directory(out, checkpoint.step)
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another directory")
    part = part_of(target)
    try:
        part.mkdir(parents=True, exist_ok=True)
        for shard in tqdm(range(num_shards), unit="file", file=sys.stderr, disable=None):
            tensors, starts = _cut(checkpoint, shard, num_shards)
            write_tensors(
                tensors, part / shard_file(shard), metadata={"starts": json.dumps(starts)}
            )
        write_tensors(checkpoint.shared, part / SHARED_FILE)
        (part / STATE_FILE).write_text(json.dumps(checkpoint.state, indent=1))
        names = [*map(shard_file, range(num_shards)), SHARED_FILE, STATE_FILE]
        _copy_measured(checkpoint, part, out)
        seal(part, target, {name: flushed_sum(part / name) for name in names})
    except (OSError, SafetensorError) as error:  # SafetensorError on a full disk, among others
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return {"from": str(checkpoint.path), "checkpoint": str(target), "shards": num_shards}


def _copy_measured(checkpoint: Checkpoint, part: Path, out: Path) -> None:
    """Copy what was measured after the save, and the start that the guard compares with.

    Raises:
        OSError: it cannot be read or written.
    """
    verdicts = read_verdicts(checkpoint.path)
    if checkpoint.measured is not None:
        write_measured(part, checkpoint.measured)
    for verdict in reversed(verdicts):  # the newest last
        write_measured(part, checkpoint.measured, verdict)
    start = checkpoint.path.parent.parent / START_FILE
    if start.is_file() and not (out / START_FILE).exists():
        shutil.copyfile(start, out / START_FILE)


def _cut(
    checkpoint: Checkpoint, shard: int, num_shards: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """One shard: an equal slice of every parameter, its average and its moments."""
    tensors, starts = {}, {}
    for kind, names in checkpoint.kinds().items():
        for name in names:
            numel = checkpoint.numel(name)
            size = -(-numel // num_shards)
            start = min(shard * size, numel)
            count = min(size, numel - start)
            if count:
                tensors[f"{kind}/{name}"] = checkpoint.read(kind, name, start, count)
                starts[name] = start
    return tensors, starts
