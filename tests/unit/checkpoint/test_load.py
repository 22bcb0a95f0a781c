"""What is read of a checkpoint and when; an unreadable checkpoint does not count as damaged."""

import errno
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoscale.checkpoint import read_errors
from dinoscale.checkpoint.checksums import read_sums, sha256, verify, write_sums
from dinoscale.checkpoint.layout import (
    INDEX_FILE,
    MEASURED_FILE,
    STATE_FILE,
    checkpoints,
    directory,
    leftovers,
    shard_file,
)
from dinoscale.checkpoint.load import Checkpoint, open_run, open_verified
from dinoscale.checkpoint.manage import prune_checkpoints, verify_checkpoints
from dinoscale.checkpoint.progress import write_measured
from dinoscale.checkpoint.read_errors import with_retries
from dinoscale.checkpoint.retention import Keep, prune
from dinoscale.convert.run_checkpoint import is_run
from dinoscale.errors import CheckpointError, UnreadableError
from dinoscale.training.resume import find_checkpoint
from tests.unit.checkpoint.stored import KINDS, SHAPES, store, value_of

RANKS = 4


class Disk:
    """Counts opened files, and fails a given number of times for paths that end with `name`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: Counter[str] = Counter()
        self.error, self.name, self.failures = 0, "", 0.0
        self.slept: list[float] = []
        monkeypatch.setattr("time.sleep", self.slept.append)
        for module, function in (("io", "open"), ("os", "open")):
            self._watch(monkeypatch, module, function)
        for function in ("listdir", "scandir", "stat"):
            self._watch(monkeypatch, "os", function)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> None:
        original: Callable[..., Any] = getattr(__import__(module), function)

        def watched(path: Any = ".", *arguments: Any, **named: Any) -> Any:
            text = str(path)  # or the number of an open file
            if self.name and text.endswith(self.name) and self.failures > 0:
                self.failures -= 1
                raise OSError(self.error, os.strerror(self.error), text)
            if function == "open":
                self.opened[os.path.basename(path)] += 1
            return original(path, *arguments, **named)

        monkeypatch.setattr(f"{module}.{function}", watched)

    def fail(self, name: str, number: int, *, times: float = float("inf")) -> None:
        """From now on."""
        self.name, self.error, self.failures = name, number, times


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def _all_equal(checkpoint: Checkpoint) -> bool:
    return all(
        torch.equal(checkpoint.read(kind, name, start, 2), value_of(kind, name)[start : start + 2])
        for kind in KINDS
        for name, shape in SHAPES.items()
        for start in range(torch.Size(shape).numel() - 1)
    )


def test_opening_reads_no_shard_and_a_rank_opens_only_what_it_needs(
    tmp_path: Path, disk: Disk
) -> None:
    path = store(tmp_path, 1, ranks=RANKS)
    disk.opened.clear()
    checkpoint = Checkpoint(path)
    assert disk.opened == {"SHA256SUMS": 1, STATE_FILE: 1, "shared.safetensors": 1, INDEX_FILE: 1}
    received = pickle.loads(pickle.dumps(checkpoint))  # as rank 0 hands it to the others
    disk.opened.clear()
    for kind in KINDS:
        share = 4  # of 15 elements on four ranks
        assert torch.equal(
            received.read(kind, "backbone.a", 4, share), value_of(kind, "backbone.a")[4:8]
        )
    assert disk.opened == {shard_file(1): 1}
    assert _all_equal(received)
    assert checkpoint.kinds() == {kind: sorted(SHAPES) for kind in sorted(KINDS)}


def test_all_ranks_use_the_accuracy_read_on_opening(tmp_path: Path, disk: Disk) -> None:
    path = store(tmp_path, 1, ranks=1)
    write_measured(path, 50.0)
    disk.fail(MEASURED_FILE, errno.ESTALE, times=1)
    checkpoint = Checkpoint(path)
    assert disk.slept == [1.0]
    disk.fail(MEASURED_FILE, errno.ESTALE)
    received = pickle.loads(pickle.dumps(checkpoint))
    assert received.progress == checkpoint.progress
    assert received.progress.knn_top1 == 50.0
    with pytest.raises(UnreadableError):
        Checkpoint(path)


def test_whole_tensors_are_read_file_by_file(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoscale.checkpoint.shard_files._MAX_OPEN", 1)
    checkpoint = Checkpoint(store(tmp_path, 1, ranks=RANKS))
    disk.opened.clear()
    for name, whole in checkpoint.full("ema").items():
        assert torch.equal(whole, value_of("ema", name).view(SHAPES[name]))
    assert disk.opened == {shard_file(rank): 1 for rank in range(RANKS)}


def test_checkpoint_without_an_index_still_opens(tmp_path: Path) -> None:
    path = store(tmp_path, 1, ranks=RANKS)
    (path / INDEX_FILE).unlink()
    write_sums(path, {n: s for n, s in read_sums(path).items() if n != INDEX_FILE})
    assert _all_equal(open_verified(path))


@pytest.mark.parametrize("changes", [{}, {"rows": 1}, {"numel": 1 << 61}, {"file": 9}, {"cut": 3}])
def test_a_wrong_index_is_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    from dinoscale.checkpoint.index import index_from_bytes

    path = store(tmp_path, 1, ranks=1)
    data = (path / INDEX_FILE).read_bytes()
    index = index_from_bytes(data)
    rows = index.rows.copy()
    rows[0, 1:3] = changes.get("numel", rows[0, 1]), changes.get("file", 0)
    lie = type(index)(index.files, index.spans, rows[changes.get("rows", 0) :])
    data = lie.to_bytes()
    (path / INDEX_FILE).write_bytes(data[: len(data) - changes.get("cut", 0)])
    write_sums(path, {name: sha256(path / name) for name in read_sums(path)})
    if changes:
        with pytest.raises(CheckpointError, match="step_00000001 is not a complete checkpoint"):
            open_verified(path)
    else:
        assert _all_equal(open_verified(path))


_ERRORS = [errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOENT]
_FILES = [f"step_00000002/{n}" for n in (shard_file(2), STATE_FILE, "SHA256SUMS", INDEX_FILE)]


@pytest.mark.parametrize("number", _ERRORS)
@pytest.mark.parametrize("name", [*_FILES, "/checkpoints"])
def test_one_file_system_error_costs_a_second(
    tmp_path: Path, disk: Disk, name: str, number: int
) -> None:
    store(tmp_path, 1, ranks=RANKS)
    newest = store(tmp_path, 2, ranks=RANKS)
    disk.fail(name, number, times=1)
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.path == newest
    assert _all_equal(checkpoint)
    assert disk.slept == [1.0]


@pytest.mark.parametrize("name", [*_FILES, "/checkpoints"])
@pytest.mark.parametrize("opener", [find_checkpoint, open_run, verify_checkpoints])
def test_an_unreadable_checkpoint_is_refused_and_not_renamed(
    tmp_path: Path, disk: Disk, name: str, opener: Callable[[Path], object]
) -> None:
    for step in (1, 2):
        store(tmp_path, step, ranks=RANKS)
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    disk.fail(name, errno.ESTALE)
    with pytest.raises(UnreadableError, match=rf"rank 0 on \S+ cannot read .*{name}: .*ESTALE 116"):
        opener(tmp_path)
    assert 55 <= sum(disk.slept) <= 130
    disk.fail("", 0)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


@pytest.mark.parametrize("number", _ERRORS)
def test_a_folder_that_cannot_be_listed_does_not_count_as_empty(
    tmp_path: Path, disk: Disk, number: int
) -> None:
    asked: list[Callable[[Path], object]] = [checkpoints, leftovers, is_run]
    (tmp_path / "file").touch()
    for ask in asked:
        assert not ask(tmp_path / "new" / "run")
        assert not ask(tmp_path / "file")
    newest = store(tmp_path, 1, ranks=1)
    disk.fail("/checkpoints", number)
    for ask in asked:
        with pytest.raises(UnreadableError):
            ask(tmp_path)
    assert prune(tmp_path, Keep(last=1), written=newest) == []


def test_a_file_or_folder_that_is_there_at_a_second_look_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes it, or a host lists what was there some seconds ago."""
    folder, file = tmp_path / "run" / "checkpoints", tmp_path / "state.json"
    look = read_errors.is_missing

    def missing(path: Path) -> bool:
        if path.exists():
            return look(path)
        if path == folder:
            folder.mkdir(parents=True)
        else:
            file.write_text("{}")
        return True

    monkeypatch.setattr(read_errors, "is_missing", missing)
    assert checkpoints(tmp_path / "run") == []
    assert folder.exists()
    assert with_retries(file.read_text, file) == "{}"


def test_a_copy_is_no_newer_when_its_state_is_unreadable_at_first(
    tmp_path: Path, disk: Disk
) -> None:
    for step in (6, 12):
        store(tmp_path, step, ranks=1)
    _copied(tmp_path, 6, to=999)
    disk.fail(f"step_00000999/{STATE_FILE}", errno.ESTALE, times=3)
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.path == directory(tmp_path, 12)


def test_a_later_failing_read_is_retried_with_a_new_handle(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(store(tmp_path, 1, ranks=1))
    read, calls = os.preadv, iter(range(100))

    def stale_at_first(*arguments: Any) -> int:
        if next(calls) == 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(*arguments)

    monkeypatch.setattr("os.preadv", stale_at_first)
    disk.opened.clear()
    assert _all_equal(checkpoint)
    assert (disk.slept, disk.opened) == ([1.0], {shard_file(0): 2})


def test_a_mismatch_counts_when_it_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(tmp_path, 1, ranks=1)
    whole = (path / shard_file(0)).read_bytes()
    (path / shard_file(0)).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    advise = os.posix_fadvise

    def mend(*arguments: Any) -> None:  # the storage was right, this machine's copy was not
        (path / shard_file(0)).write_bytes(whole)
        advise(*arguments)

    with pytest.raises(CheckpointError, match="does not match its checksum"):
        verify(path)
    monkeypatch.setattr("os.posix_fadvise", mend)
    verify(path)


def test_format_of_another_version_is_refused_and_not_renamed(tmp_path: Path) -> None:
    store(tmp_path, 1, ranks=1)
    store(tmp_path, 2, ranks=1, format=3)
    with pytest.raises(UnreadableError, match="has format 3, and this version reads 2"):
        find_checkpoint(tmp_path)
    assert directory(tmp_path, 2).is_dir()


def test_a_file_in_place_of_a_checkpoint_is_a_damaged_one(tmp_path: Path, disk: Disk) -> None:
    newest = store(tmp_path, 1, ranks=1)
    directory(tmp_path, 2).touch()
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.path, disk.slept) == (newest, [])


def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_used(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        store(tmp_path, step, ranks=RANKS)
    (directory(tmp_path, 3) / shard_file(3)).unlink()
    (directory(tmp_path, 2) / shard_file(0)).write_bytes(b"")
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["damaged_step_00000002", "damaged_step_00000003", "step_00000001"]


@pytest.mark.parametrize("name", [STATE_FILE, MEASURED_FILE])
def test_nothing_unreadable_is_deleted(tmp_path: Path, disk: Disk, name: str) -> None:
    about = {"saved_at": "then", "plan": {"world_size": 1}}
    about |= {"config": {"engine": {"zero_stage": 0}}}
    for step, knn in ((1, 90.0), (2, 10.0), (3, 20.0)):
        store(tmp_path, step, ranks=1, progress={"knn_top1": knn}, **about)
    write_measured(directory(tmp_path, 1), 95.0)
    disk.fail(f"1/{name}", errno.EIO)  # of the best
    newest = directory(tmp_path, 3)
    assert prune(tmp_path, Keep(last=1, best=True), written=newest) == [directory(tmp_path, 2)]
    with pytest.raises(UnreadableError):
        prune_checkpoints(tmp_path, Keep(last=1), dry_run=False)
    disk.fail("", 0)
    assert (directory(tmp_path, 1) / STATE_FILE).is_file()


def _copied(run_dir: Path, step: int, *, to: int) -> Path:
    import shutil

    return Path(shutil.copytree(directory(run_dir, step), directory(run_dir, to)))


def test_the_state_decides_the_step_and_a_copy_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (6, 12):
        store(tmp_path, step, ranks=1)
    _copied(tmp_path, 6, to=999)
    assert open_run(tmp_path).step == 12  # changes no name
    assert "step_00000999 holds step 6" in caplog.text
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.path == directory(tmp_path, 12)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["misnamed_step_00000999", "step_00000006", "step_00000012"]


def test_a_renamed_checkpoint_gets_its_name_back(tmp_path: Path) -> None:
    store(tmp_path, 6, ranks=1).rename(directory(tmp_path, 999))
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.path == directory(tmp_path, 6)


def test_a_state_that_fails_its_checksum_counts_as_damaged(tmp_path: Path) -> None:
    store(tmp_path, 1, ranks=1)
    state = store(tmp_path, 2, ranks=1) / STATE_FILE
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 7}))
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert (tmp_path / "checkpoints" / "damaged_step_00000002").is_dir()


def test_a_copy_under_another_name_is_neither_counted_nor_deleted(tmp_path: Path) -> None:
    about = {"saved_at": "then", "plan": {"world_size": 1}}
    about |= {"config": {"engine": {"zero_stage": 0}}}
    for step in (6, 12, 18):
        store(tmp_path, step, ranks=1, progress={"knn_top1": None}, **about)
    copy = _copied(tmp_path, 6, to=999)
    deleted = prune(tmp_path, Keep(last=2), written=directory(tmp_path, 18))
    assert deleted == [directory(tmp_path, 6)]
    assert copy.is_dir()


def test_of_phases_that_lead_to_no_other_the_one_taken_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def phase(name: str, *, after: str | None, start: str = "continue_from") -> None:
        source = after and f"elsewhere/phases/{after}"  # the run was moved
        train = {"continue_from": None, "init_from": None, start: source}
        store(tmp_path / "phases" / name, 1, ranks=1, config={"train": train})

    phase("01_begun", after=None)
    phase("02_gram", after="01_begun")
    phase("03_large", after="02_gram", start="init_from")
    assert open_run(tmp_path).path.parts[-3] == "03_large"
    assert not caplog.records  # a chain has one end
    phase("04_other", after="01_begun")
    assert open_run(tmp_path).path.parts[-3] == "04_other"
    assert caplog.messages == [
        f"{tmp_path} has several phases that lead to no other: taking the last, 04_other; "
        f"give {tmp_path}/phases/03_large for another"
    ]
    assert open_run(tmp_path / "phases" / "03_large").path.parts[-3] == "03_large"
    assert len(caplog.records) == 1
