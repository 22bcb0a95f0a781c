"""List, verify and prune the checkpoints of a run from the command line, on one process."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dinoscale.checkpoint.layout import checkpoints, is_checkpoint, run_with_checkpoints
from dinoscale.checkpoint.retention import Keep, Summary, best_of, delete, summary, superfluous
from dinoscale.errors import CheckpointError, UnreadableError


def list_checkpoints(run_dir: Path) -> dict[str, Any]:
    """Step, size, accuracy and origin of each checkpoint of a run, oldest first, unverified.

    Raises:
        CheckpointError: there is none.
    """
    found = _summaries(run_dir)
    best = best_of(found)
    rows = [
        {**asdict(s), "path": str(s.path), "guard": s.guard_text, "best": s is best} for s in found
    ]
    return {"run_dir": str(run_dir), "checkpoints": rows}


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `list_checkpoints` as a text table."""
    head = f"{'step':>9}  {'saved at':25}  {'MB':>9}  {'ranks':>5}  {'stage':>5}  k-NN top-1"
    guarded = any(row["guard"] for row in rows)
    lines = [f"{head}  guard" if guarded else head]
    for row in rows:
        if row["saved_at"] is None:
            lines.append(f"{row['step']:9}  cannot be read; try `dinoscale checkpoint verify`")
            continue
        knn = "-" if row["knn_top1"] is None else f"{row['knn_top1']:.1f}"
        lines.append(
            f"{row['step']:9}  {row['saved_at']:25}  {row['num_bytes'] / 1e6:9.1f}"
            f"  {row['world_size']:5}  {row['zero_stage']:5}  "
            + (f"{knn:10}  {row['guard']}".rstrip() if guarded else knn)
            + (" best" if row["best"] else "")
        )
    return "\n".join(lines)


def verify_checkpoints(run: Path) -> dict[str, Any]:
    """Compare the files of a checkpoint, or of all of a run, with their checksums.

    Returns:
        JSON-able: per checkpoint its path and its damage, None if it is intact.

    Raises:
        CheckpointError: there is none.
    """
    paths = [run] if is_checkpoint(run) else _found(run)
    rows = [{"path": str(path), "damage": _damage(path)} for path in _bar(paths)]
    return {"checkpoints": rows, "damaged": sum(row["damage"] is not None for row in rows)}


def prune_checkpoints(run_dir: Path, keep: Keep, *, dry_run: bool) -> dict[str, Any]:
    """Delete the checkpoints that no rule of `keep` keeps; damaged ones stay and do not count.

    Raises:
        CheckpointError: there is none, or `keep` would leave none.
    """
    if keep.last < 1:
        raise CheckpointError(f"--keep-last: need at least 1, got {keep.last}")
    found = _summaries(run_dir)
    good = [s for s in _bar(found) if _damage(s.path) is None]
    unneeded = [s.path for s in superfluous(good, keep)]
    deleted = [str(path) for path in unneeded if dry_run or delete(path)]
    damaged = [str(s.path) for s in found if s not in good]
    kept = [str(s.path) for s in good if str(s.path) not in deleted]
    return {"deleted": deleted, "kept": kept, "damaged": damaged, "dry_run": dry_run}


def _found(run_dir: Path) -> list[Path]:
    found = checkpoints(run_with_checkpoints(run_dir))
    if not found:
        raise CheckpointError(f"no checkpoint in {run_dir}: give a run directory")
    return found


def _summaries(run_dir: Path) -> list[Summary]:
    return sorted(map(summary, _found(run_dir)), key=lambda s: s.step)


def _damage(path: Path) -> str | None:
    from dinoscale.checkpoint.load import open_verified  # imports torch, which `list` avoids

    try:
        open_verified(path)
    except UnreadableError:
        raise
    except CheckpointError as error:
        return str(error)
    return None


def _bar(items: list[Any]) -> Any:
    return tqdm(items, desc="verifying", unit="checkpoint", file=sys.stderr, disable=None)
