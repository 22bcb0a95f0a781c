"""Write a checkpoint beside the training: copy to memory, write, add checksums, rename.

Training stands still for the copy only. Threads then write and agree over the store, never by a
collective, which would mix with those of training. A directory gets its name when the files of all
ranks and their checksums are on disk, so one that is named step_* was written to its end.
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
    EMA,
    FORMAT,
    MASTER,
    SHARED_FILE,
    STATE_FILE,
    directory,
    part_of,
    shard_file,
)
from dinoscale.checkpoint.progress import write_measured
from dinoscale.checkpoint.retention import Keep, prune
from dinoscale.engine.student import Student
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import LostPeerError
from dinoscale.runtime import distributed
from dinoscale.runtime.outputs import write_tensors

log = logging.getLogger(__name__)
T = TypeVar("T")

_LOOK_S = 0.5  # between two looks whether the writing goes on
_numbers = itertools.count()  # of saves of this process; equal on all ranks


@dataclass(frozen=True)
class SaveResult:
    """How a save ended, the same on every rank but for the seconds.

    Attributes:
        path: of the checkpoint.
        step: optimizer steps it holds.
        error: why it could not be written; None if it is on disk.
        stall_s: how long this rank's training stood still.
        write_s: how long the writing took beside it.
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
    """Files of one rank, in memory."""

    step: int
    number: int
    tensors: dict[str, dict[str, Tensor]]  # file -> name -> tensor
    starts: dict[str, int]  # parameter -> its first element in this rank's shard
    texts: dict[str, str]  # file -> contents


class Saver:
    """Saves a run, one checkpoint at a time; all ranks call every method at the same steps."""

    def __init__(self, run_dir: Path, keep: Keep) -> None:
        """Args: of the run, on a file system that all ranks share; which checkpoints stay."""
        self._run_dir, self._keep = run_dir, keep
        self._store = distributed.KeyValueStore()
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[SaveResult] | None = None
        self._own_files: Future[None] | None = None  # of the one under way, or of the last
        self._noting: Future[None] | None = None
        # What shows that this rank's writing goes on: pieces counted, a folder of growing files.
        self._moves, self._growing = 0, directory(run_dir, 0)

    def begin(
        self,
        step: int,
        student: Student,
        teacher: Teacher,
        about: Mapping[str, Any],
        *,
        since: float | None = None,
    ) -> SaveResult | None:
        """Copy everything a run needs to go on after `step` steps, and start to write it.

        Args:
            step: optimizer steps done.
            student: weights and moments.
            teacher: average and center.
            about: JSON-able facts to store: config, plan, versions, progress.
            since: `time.perf_counter()` when training stopped for it; None: now.

        Returns:
            How the save before this one ended, if nobody has asked yet; it is waited for.
        """
        begin = time.perf_counter() if since is None else since
        before = self.wait()
        snapshot = self._copy(step, student, teacher, about)
        stall_s = time.perf_counter() - begin
        self._own_files = Future()
        self._writing = self._thread.submit(self._write, snapshot, stall_s)
        return before

    def measured(self, step: int, knn_top1: float) -> None:
        """Add an accuracy to the checkpoint of `step`, whose save was begun, once it is on disk.

        Args:
            step: optimizer steps that it holds.
            knn_top1: of its teacher, in percent; by it the best one stays.
        """
        if self._rank == 0:  # after what the thread is writing now
            target = directory(self._run_dir, step)
            self._noting = self._thread.submit(self._note, target, knn_top1)

    def finished(self) -> SaveResult | None:
        """How the save under way ended, once; None while anything is written or if there is none.

        Never waits: what notes an accuracy also deletes checkpoints, which may take minutes.
        """
        if self._writing is None or not self._writing.done():
            return None
        return self.wait() if self._noting is None or self._noting.done() else None

    def busy(self) -> bool:
        """Whether anything is being written or deleted."""
        works = (self._writing, self._noting)
        return not all(work is None or work.done() for work in works)

    def wait_for_own_files(self, heartbeat: Callable[[], None]) -> None:
        """Wait until this rank has written its part of the pending save; `heartbeat` as `wait`."""
        if self._own_files is not None:
            self._wait_for(self._own_files, heartbeat)

    def wait(self, heartbeat: Callable[[], None] = lambda: None) -> SaveResult | None:
        """Wait for the save under way; None if there is none.

        `heartbeat` is called whenever something shows that this rank writes, reads again or deletes
        files: not for a storage that stands still.
        """
        if self._noting is not None:
            self._wait_for(self._noting, heartbeat)
            self._noting = None
        if self._writing is None:
            return None
        result = self._wait_for(self._writing, heartbeat)
        self._writing = None
        return result

    def _wait_for(self, work: Future[T], heartbeat: Callable[[], None]) -> T:
        moves = self._moves_of_files()
        while not wait([work], _LOOK_S).done:
            before, moves = moves, self._moves_of_files()
            if moves != before:
                heartbeat()
        return work.result()

    def _moves_of_files(self) -> tuple[int, int]:
        """What changes while this rank writes; a file may get its whole size first, then blocks."""
        try:
            stats = [path.stat() for path in self._growing.iterdir()]
        except OSError:  # not yet there, or renamed just now
            return self._moves, 0
        return self._moves, sum(stat.st_size + stat.st_blocks for stat in stats)

    def _moved(self) -> None:
        self._moves += 1

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
        for kind, views in kinds.items():
            for fragment, view in zip(student.layout.fragments, views, strict=True):
                starts[fragment.name] = fragment.start
                if view is not None:
                    tensors[f"{kind}/{fragment.name}"] = _copied(view)
        files, texts = {shard_file(self._rank): tensors}, {}
        if self._rank == 0:
            state = {
                "format": FORMAT,
                "step": step,
                "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "shapes": student.shapes,
                "optimizer_steps": student.optimizer_steps(),
                **about,
            }
            live = shared_tensors(student, teacher)
            files[SHARED_FILE] = {name: _copied(value) for name, value in live.items()}
            texts[STATE_FILE] = json.dumps(state, indent=1)
        return _Snapshot(step, next(_numbers), files, starts, texts)

    def _write(self, snapshot: _Snapshot, stall_s: float) -> SaveResult:
        """Run in the thread: own files, then rank 0 completes the directory and says so."""
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
                prune(self._run_dir, self._keep, written=target, heartbeat=self._moved)
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
        """Write this rank's files; their checksums and size, or the error, as plain data."""
        sums, num_bytes = {}, 0
        try:
            # A folder of its own, for a file grows there under a name that only the library knows.
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
                sums[name] = flushed_sum(part / name, self._moved)
                num_bytes += (part / name).stat().st_size
        except Exception as error:  # whatever it is, the others wait for this report
            return {"error": f"rank {self._rank} cannot write {part}: {error}", "num_bytes": 0}
        return {"sums": sums, "num_bytes": num_bytes, "error": ""}

    def _complete(self, target: Path, number: int) -> str:
        """Rank 0: give the directory its name when all ranks are done; an error text, or ""."""
        part = part_of(target)
        keys = [f"{_key(number)}/{rank}" for rank in range(self._world_size)]
        reports = [json.loads(text) for text in self._store.wait_for(keys)]
        self._store.delete([*keys, _key(number - 1)])  # all have read how that one ended
        error = next((report["error"] for report in reports if report["error"]), "")
        if not error:
            try:
                seal(part, target, {name: s for r in reports for name, s in r["sums"].items()})
            except Exception as caught:  # whatever it is, the others wait for the verdict
                error = f"rank 0 cannot complete {target}: {caught}"
        if error:
            shutil.rmtree(part, ignore_errors=True)  # a full disk needs the space
        return error

    def _note(self, target: Path, knn_top1: float) -> None:
        if not target.is_dir():
            return  # it could not be saved, and that was said
        try:
            write_measured(target, knn_top1)
        except OSError as error:
            log.warning("cannot add k-NN %.1f %% to %s: %s", knn_top1, target, error)
        prune(self._run_dir, self._keep, written=target, heartbeat=self._moved)


def _key(number: int) -> str:
    """Under which the verdict on a save lies, and under KEY/RANK what each rank reports of it."""
    return f"save/{number}"


def shared_tensors(student: Student, teacher: Teacher) -> dict[str, Tensor]:
    """What is equal on all ranks and saved by one: the center and the buffers, by name in files."""
    tensors = {"center": teacher.center}
    for owner, buffers in (("student", student.buffers()), ("teacher", teacher.buffers())):
        tensors |= {f"{owner}/{name}": value for name, value in buffers.items()}
    return tensors


def _copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU that training does not touch."""
    return tensor.detach().to("cpu", copy=True)
