"""Write a checkpoint in the background: copy to memory, write, add checksums, rename.

Training pauses for the copy only. Threads then write, and synchronize over the store, never by a
collective, which would interleave with those of training. A directory gets its name once the files
of all ranks and their checksums are on disk, so a directory named step_* is complete.
"""

import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dinoscale.checkpoint.checksums import flushed_sum, seal
from dinoscale.checkpoint.layout import (
    ANCHOR,
    EMA,
    FORMAT,
    GRAM,
    MASTER,
    SHARED_FILE,
    STATE_FILE,
    directory,
    part_of,
    shard_file,
)
from dinoscale.checkpoint.progress import Guarded, write_measured
from dinoscale.checkpoint.retention import Keep, prune
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import LostPeerError
from dinoscale.runtime import distributed
from dinoscale.runtime.outputs import write_tensors

log = logging.getLogger(__name__)
T = TypeVar("T")

_POLL_S = 0.5  # between two checks that the writing advances
_numbers = itertools.count()  # number the saves of this process; equal on all ranks


@dataclass(frozen=True)
class SaveResult:
    """Result of a save; path, step and error are the same on every rank.

    Attributes:
        path: of the checkpoint.
        step: optimizer steps it holds.
        error: why it could not be written; None if it is on disk.
        stall_s: seconds for which this rank's training paused.
        write_s: seconds of writing in the background.
        num_bytes: written by this rank.
    """

    path: Path
    step: int
    error: str | None
    stall_s: float
    write_s: float
    num_bytes: int


@dataclass(frozen=True)
class _Snapshot:
    """Contents of one rank's files, in memory."""

    step: int
    number: int
    tensors: dict[str, dict[str, Tensor]]  # file -> name -> tensor
    starts: dict[str, int]  # parameter -> its first element in this rank's shard
    texts: dict[str, str]  # file -> contents


class Saver:
    """Saves a run, one checkpoint at a time; all ranks call every method at the same steps."""

    def __init__(self, run_dir: Path, keep: Keep) -> None:
        """Args: run_dir: on a file system that all ranks share. keep: which checkpoints to keep."""
        self._run_dir, self._keep = run_dir, keep
        self._store = distributed.KeyValueStore()
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[SaveResult] | None = None
        self._own_files: Future[None] | None = None  # of the current save, or of the last one
        self._adding_accuracy: Future[None] | None = None
        # Both show that this rank's writing advances: pieces written, a folder of growing files.
        self._pieces, self._growing = 0, directory(run_dir, 0)

    def begin(
        self,
        step: int,
        student: Student,
        teacher: Teacher,
        about: Mapping[str, Any],
        *,
        since: float | None = None,
    ) -> SaveResult | None:
        """Copy everything that a resume after `step` steps needs, and start to write it.

        Args:
            step: optimizer steps done.
            student: weights and moments.
            teacher: average, center, Gram network and anchor.
            about: JSON-able facts to store: config, plan, versions, progress.
            since: `time.perf_counter()` when training paused for it; None for now.

        Returns:
            Result of the save before this one, which is waited for; None if already returned.
        """
        begin = time.perf_counter() if since is None else since
        before = self.wait()
        snapshot = self._copy(step, student, teacher, about)
        stall_s = time.perf_counter() - begin
        self._own_files = Future()
        self._writing = self._thread.submit(self._write, snapshot, stall_s)
        return before

    def measured(self, step: int, knn_top1: float | None, guarded: Guarded | None = None) -> None:
        """Add measurements to the checkpoint of `step`, whose save has begun, once it is on disk.

        Args:
            step: optimizer steps that it holds.
            knn_top1: of its teacher, in percent.
            guarded: what the guard has measured; one of both decides which checkpoint is the best.
        """
        if self._rank == 0:  # queued behind the current write
            target = directory(self._run_dir, step)
            self._adding_accuracy = self._thread.submit(
                self._add_measured, target, knn_top1, guarded
            )

    def finished(self) -> SaveResult | None:
        """Result of the current save, once; None while anything is written or if there is none.

        Never waits: adding an accuracy also deletes checkpoints, which may take minutes.
        """
        if self._writing is None or self.busy():
            return None
        return self.wait()

    def busy(self) -> bool:
        """Whether anything is being written or deleted."""
        works = (self._writing, self._adding_accuracy)
        return not all(work is None or work.done() for work in works)

    def wait_for_own_files(self, heartbeat: Callable[[], None]) -> None:
        """Wait until this rank's files of this save are written; `heartbeat` as in `wait`."""
        if self._own_files is not None:
            self._wait_for(self._own_files, heartbeat)

    def wait(self, heartbeat: Callable[[], None] = lambda: None) -> SaveResult | None:
        """Wait for the current save and return its result; None if there is none.

        `heartbeat` is called whenever this rank is seen to write, check or delete files, so not
        while the storage hangs.
        """
        if self._adding_accuracy is not None:
            self._wait_for(self._adding_accuracy, heartbeat)
            self._adding_accuracy = None
        if self._writing is None:
            return None
        result = self._wait_for(self._writing, heartbeat)
        self._writing = None
        return result

    def _wait_for(self, work: Future[T], heartbeat: Callable[[], None]) -> T:
        activity = self._activity()
        while not wait([work], _POLL_S).done:
            before, activity = activity, self._activity()
            if activity != before:
                heartbeat()
        return work.result()

    def _activity(self) -> tuple[int, int]:
        """Two numbers that change while this rank writes, as a file's size or blocks grow."""
        try:
            stats = [path.stat() for path in self._growing.iterdir()]
        except OSError:  # not yet there, or just renamed
            return self._pieces, 0
        return self._pieces, sum(stat.st_size + stat.st_blocks for stat in stats)

    def _count_piece(self) -> None:
        self._pieces += 1

    def _copy(
        self, step: int, student: Student, teacher: Teacher, about: Mapping[str, Any]
    ) -> _Snapshot:
        tensors: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        kinds: dict[str, list[Tensor | None]] = {
            MASTER: list(student.master),
            EMA: list(teacher.ema),
            **student.optimizer_state(),
        }
        gram = teacher.gram
        if gram is not None and gram.refreshes is not None:
            kinds[GRAM] = gram.backbone.own
        if teacher.anchor is not None:
            kinds[ANCHOR] = teacher.anchor.own
        for kind, views in kinds.items():
            for fragment, view in zip(student.layout.fragments, views, strict=True):
                starts[fragment.name] = fragment.start
                if view is not None:
                    tensors[f"{kind}/{fragment.name}"] = _copied(view).float()
        for fragment, values in student.frozen.held():
            starts[fragment.name] = fragment.start
            tensors[f"{MASTER}/{fragment.name}"] = values
        files, texts = {shard_file(self._rank): tensors}, {}
        if self._rank == 0:
            state = {
                "format": FORMAT,
                "step": step,
                "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "shapes": student.shapes,
                "frozen": sorted(student.frozen.parameters),
                "optimizer_steps": student.optimizer_steps(),
                "gram_refreshes": None if gram is None else gram.refreshes,
                "anchor": teacher.anchor is not None,
                "frozen_teacher": None if teacher.frozen is None else teacher.frozen.identity,
                **about,
            }
            live = shared_tensors(student, teacher)
            files[SHARED_FILE] = {name: _copied(value) for name, value in live.items()}
            texts[STATE_FILE] = json.dumps(state, indent=1)
        return _Snapshot(step, next(_numbers), files, starts, texts)

    def _write(self, snapshot: _Snapshot, stall_s: float) -> SaveResult:
        """Run in the thread: write this rank's files; rank 0 then completes the directory."""
        begin = time.perf_counter()
        target = directory(self._run_dir, snapshot.step)
        own = self._write_files(part_of(target), snapshot)
        assert self._own_files is not None
        self._own_files.set_result(None)
        key = _key(snapshot.number)
        try:
            self._store.set(f"{key}/{self._rank}", json.dumps(own))
            if self._rank == 0:
                self._store.set(key, self._complete(target, snapshot.number))
            [error] = self._store.wait_for([key])
            if self._rank == 0 and not error:
                prune(self._run_dir, self._keep, written=target, heartbeat=self._count_piece)
        except LostPeerError as lost:
            error = str(lost)
        return SaveResult(
            path=target,
            step=snapshot.step,
            error=error or None,
            stall_s=stall_s,
            write_s=time.perf_counter() - begin,
            num_bytes=own["num_bytes"],
        )

    def _write_files(self, part: Path, snapshot: _Snapshot) -> dict[str, Any]:
        """Write this rank's files; return their checksums and size, or the error, as plain data."""
        sums, num_bytes = {}, 0
        try:
            # Its own folder: a file grows there under a temporary name of safetensors.
            self._growing = part / f"rank_{self._rank:05d}"
            self._growing.mkdir(parents=True, exist_ok=True)
            for name, tensors in snapshot.tensors.items():
                file, metadata = self._growing / name, {"starts": json.dumps(snapshot.starts)}
                write_tensors(tensors, file, metadata=metadata)
                file.rename(part / name)
            self._growing.rmdir()
            for name, text in snapshot.texts.items():
                (part / name).write_text(text)
            for name in (*snapshot.tensors, *snapshot.texts):
                sums[name] = flushed_sum(part / name, self._count_piece)
                num_bytes += (part / name).stat().st_size
        except Exception as error:  # of any type: the other ranks wait for this report
            return {"error": f"rank {self._rank} cannot write {part}: {error}", "num_bytes": 0}
        return {"sums": sums, "num_bytes": num_bytes, "error": ""}

    def _complete(self, target: Path, number: int) -> str:
        """Rank 0: rename the directory once all ranks are done; return an error text, or ""."""
        part = part_of(target)
        keys = [f"{_key(number)}/{rank}" for rank in range(self._world_size)]
        reports = [json.loads(text) for text in self._store.wait_for(keys)]
        self._store.delete([*keys, _key(number - 1)])  # all ranks have read the last result
        error = next((report["error"] for report in reports if report["error"]), "")
        if not error:
            try:
                seal(part, target, {name: s for r in reports for name, s in r["sums"].items()})
            except Exception as caught:  # of any type: the other ranks wait for the result
                error = f"rank 0 cannot complete {target}: {caught}"
        if error:
            shutil.rmtree(part, ignore_errors=True)  # a full disk needs the space
        return error

    def _add_measured(self, target: Path, knn_top1: float | None, guarded: Guarded | None) -> None:
        if not target.is_dir():
            return  # its save failed, which was reported
        try:
            write_measured(target, knn_top1, guarded)
        except OSError as error:
            log.warning("cannot add what was measured to %s: %s", target, error)
        prune(self._run_dir, self._keep, written=target, heartbeat=self._count_piece)


def _key(number: int) -> str:
    """Store key of a save's result; KEY/RANK holds the report of each rank."""
    return f"save/{number}"


def shared_tensors(student: Student, teacher: Teacher) -> dict[str, Tensor]:
    """Tensors that are equal on all ranks and saved by one, by name: centers and buffers."""
    tensors = teacher.centers()
    for owner, buffers in (("student", student.buffers()), ("teacher", teacher.buffers())):
        tensors |= {f"{owner}/{name}": value for name, value in buffers.items()}
    return tensors


def _copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU that training does not change."""
    return tensor.detach().to("cpu", copy=True)
