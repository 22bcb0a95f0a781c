"""Check that all ranks share run_dir and can write to it, and that its checkpoints fit."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dinoscale.checkpoint.layout import checkpoints, not_resumed
from dinoscale.checkpoint.next_phase import find_next_phase
from dinoscale.cluster.doctor.marker import RunDirFacts, look_for, remove_marker, write_marker
from dinoscale.cluster.doctor.report import Check, ok, problem, size_text, warning
from dinoscale.config import RunConfig, phases_of
from dinoscale.engine.param_groups import MOMENTS
from dinoscale.errors import UnreadableError
from dinoscale.runtime import distributed
from dinoscale.runtime.hosts import ranks_text

_OTHER_FILES = 8  # of a checkpoint and a run, besides one for each rank
_NO_SPACE = ("Disk quota exceeded", "No space left on device")


def check_shared(folder: Path, hosts: list[str], *, name: str = "run_dir") -> Check:
    """Let every rank look for a file of rank 0, which is then removed; all ranks call it."""
    made: list[Path] = []
    path = folder.absolute()
    marker = write_marker(path, made) if distributed.rank() == 0 else None
    try:
        marker = distributed.broadcast_object(marker)
        assert marker is not None
        if marker.error:
            return problem(
                name,
                f"rank 0 cannot write to {marker.run_dir}: {marker.error}; choose another {name}",
            )
        found = distributed.gather_objects(look_for(path, marker, own=str(distributed.rank())))
    finally:
        if distributed.rank() == 0:
            remove_marker(path, marker, made)
    return judge_shared(found, hosts, name=name)


def judge_shared(found: Sequence[RunDirFacts], hosts: list[str], *, name: str = "run_dir") -> Check:
    """Name the ranks that do not see rank 0's file, or cannot write beside it."""
    blind = [rank for rank, of_rank in enumerate(found) if not of_rank.seen]
    if blind:
        elsewhere = found[blind[0]].run_dir
        return problem(
            name,
            f"{ranks_text(blind, hosts)} cannot see in {elsewhere} what rank 0 ({hosts[0]}) wrote"
            f" to {found[0].run_dir}; put {name} on a file system that all nodes share",
        )
    failed = [rank for rank, of_rank in enumerate(found) if of_rank.error]
    if failed:
        return problem(
            name,
            f"{ranks_text(failed, hosts)} cannot write to {found[0].run_dir}:"
            f" {found[failed[0]].error}; give this user the right to write there",
        )
    by = "" if len(found) == 1 else f" by {len(found)} ranks"
    return ok(name, f"{found[0].run_dir} is seen and writable{by}")


def check_disk(config: RunConfig, *, parameters: int, world_size: int) -> Check:
    """Compare free space and inodes at run_dir with the checkpoints of this run; on rank 0."""
    run_dir = Path(config.run_dir).absolute()
    try:
        folder = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
        free_bytes = shutil.disk_usage(folder).free
        num_present = sum(len(checkpoints(Path(run.run_dir))) for run in phases_of(config))
        one = checkpoint_bytes(
            parameters,
            optimizer=config.optim.name,
            gram=any(run.gram.loss_weight for run in phases_of(config)),
        )
        refused = _why_no_space(folder, one) if free_bytes >= one else None
    except (OSError, UnreadableError) as error:
        reason = getattr(error, "strerror", None) or error
        return problem("disk", f"{run_dir}: {reason}; choose another with run_dir=PATH")
    return judge_disk(
        free_bytes=free_bytes,
        checkpoint_bytes=one,
        num_checkpoints=sum(map(num_checkpoints, phases_of(config))),
        num_present=num_present,
        path=str(run_dir),
        free_files=_free_files(folder),
        checkpoint_files=world_size + _OTHER_FILES,
        refused=refused,
    )


def _free_files(folder: Path) -> int | None:
    """Number of free inodes, None if the file system does not count them."""
    found = os.statvfs(folder)
    return found.f_favail if found.f_files else None


def _why_no_space(folder: Path, num_bytes: int) -> str | None:
    """Why the file system refuses the space of a file, as a quota does; None if it does not.

    The space is reserved, not written, and freed at once; None also if reserving is unsupported.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor_") as file:
        command = ["env", "LC_ALL=C", "fallocate", "--length", str(num_bytes), file.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.SubprocessError):
            return None
    why = done.stderr.strip().rpartition(": ")[2]
    return why if done.returncode and why in _NO_SPACE else None


def check_resume(config: RunConfig) -> Check:
    """Whether the run starts, continues, or is refused; on rank 0."""
    runs = phases_of(config)
    try:
        present = any(checkpoints(Path(run.run_dir)) for run in runs)
        taken = find_next_phase(config, runs).index if config.phases and present else 0
        own = checkpoints(Path(runs[taken].run_dir))
    except UnreadableError as error:
        return problem("resume", str(error))
    if present and not config.resume:
        return problem("resume", not_resumed(Path(config.run_dir)))
    if own:
        return ok("resume", f"continues from {own[-1]}")
    if present:
        return ok("resume", f"begins phase {config.phases[taken].name}")
    return ok("resume", "no checkpoint in run_dir: starts from the beginning")


def checkpoint_bytes(parameters: int, *, optimizer: str, gram: bool = False) -> int:
    """Size of a checkpoint over all ranks: float32 master, EMA and moments of each weight.

    A Gram network counts with as many weights, though it has no head, which is small.
    """
    return 4 * parameters * (2 + len(MOMENTS[optimizer]) + gram)


def num_checkpoints(config: RunConfig) -> int:
    """Most checkpoints in run_dir at once, including the one being written."""
    rule = config.checkpoint
    permanent = 0 if rule.keep_every is None else config.train.epochs // rule.keep_every
    permanent += len(rule.keep_steps)
    measures = config.eval.train is not None or config.guard.every_steps is not None
    fallen = rule.keep_last if config.guard.on_fall == "roll_back" and measures else 0  # set aside
    return rule.keep_last + permanent + (rule.keep_best and measures) + 1 + fallen


def judge_disk(
    *,
    free_bytes: int,
    checkpoint_bytes: int,
    num_checkpoints: int,
    num_present: int,
    path: str,
    free_files: int | None = None,
    checkpoint_files: int = 1,
    refused: str | None = None,
) -> Check:
    """A problem if not even one more checkpoint fits, a warning if not all do.

    Args:
        free_bytes: of the file system.
        checkpoint_bytes: size of one checkpoint.
        num_checkpoints: most checkpoints in run_dir at once.
        num_present: checkpoints in run_dir now.
        path: run_dir.
        free_files: free inodes; None if the file system does not count them.
        checkpoint_files: files of one checkpoint.
        refused: why the file system refuses the space of a checkpoint, as a quota does; or None.
    """
    more = max(1, num_checkpoints - num_present)
    need, one = size_text(more * checkpoint_bytes), size_text(checkpoint_bytes)
    free = f"{size_text(free_bytes)} free at {path}"
    if free_bytes < checkpoint_bytes:
        return problem(
            "disk", f"{free}, one checkpoint needs {one}; make room or choose another run_dir"
        )
    if refused:
        return problem(
            "disk",
            f"{free}, but {one} for one checkpoint are refused ({refused}); have your quota raised"
            " (see `quota -s`), or choose another run_dir",
        )
    if free_files is not None and free_files < more * checkpoint_files:
        verdict = problem if free_files < checkpoint_files else warning
        return verdict(
            "disk",
            f"{free}, but only for {free_files} files (inodes, see `df -i`); {more} checkpoints"
            f" need {more * checkpoint_files}; remove files or choose another run_dir",
        )
    if free_bytes < more * checkpoint_bytes:
        return warning(
            "disk",
            f"{free}, {more} checkpoints need {need} ({one} each);"
            " make room or lower checkpoint.keep_last",
        )
    return ok("disk", f"{free}, {more} checkpoints of {one} fit")
