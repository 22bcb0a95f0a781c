"""Saves whose writing fails or takes long."""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from dinoscale.checkpoint.layout import directory
from dinoscale.checkpoint.retention import Keep
from dinoscale.checkpoint.save import Saver, SaveResult, _Snapshot
from tests.unit.checkpoint.stored import store

ABOUT: dict[str, Any] = {
    **{"saved_at": "then", "plan": {"world_size": 1}, "progress": {"knn_top1": None}},
    "config": {"engine": {"zero_stage": 0}},
}


def test_error_of_any_type_is_reported_as_others_wait_for_it(tmp_path: Path) -> None:
    no_dense_tensor = torch.zeros(2).to_sparse()  # an error that is neither a file's nor a disk's
    files = {"shard_00000.safetensors": {"weight": no_dense_tensor}}
    saver = Saver(tmp_path, Keep(last=1))
    saver._own_files = Future()
    result = saver._write(_Snapshot(1, 0, files, {}, {}), stall_s=0.0)
    assert result.error is not None
    assert result.error.startswith("rank 0 cannot write")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_training_does_not_wait_for_a_deletion_after_an_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        store(tmp_path, step, ranks=1, **ABOUT)
    saver = Saver(tmp_path, Keep(last=1))
    deleting, may_end = threading.Event(), threading.Event()
    remove = shutil.rmtree

    def slowly(path: Path) -> None:
        deleting.set()
        assert may_end.wait(60)
        remove(path)

    monkeypatch.setattr("shutil.rmtree", slowly)
    written: Future[SaveResult] = Future()
    written.set_result(SaveResult(directory(tmp_path, 2), 2, None, 0.0, 0.0, 0))
    saver._writing = written
    saver.measured(2, 50.0)
    assert deleting.wait(60)
    with ThreadPoolExecutor(1) as training:
        asked = training.submit(saver.finished)
        try:
            assert asked.result(10) is None
        finally:
            may_end.set()
    assert saver.wait() == written.result()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_waiting_signals_activity_while_the_library_writes_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doing, signs = ["writing"], []

    def sums(*_: object) -> str:
        doing[0] = "reading"
        return "0" * 64

    monkeypatch.setattr("dinoscale.checkpoint.save.flushed_sum", sums)
    monkeypatch.setattr("dinoscale.checkpoint.save._POLL_S", 0.002)
    saver = Saver(tmp_path, Keep(last=1))
    saver._own_files = Future()
    large = {str(number): torch.zeros(1 << 22) for number in range(8)}  # 128 MB
    snapshot = _Snapshot(1, 0, {"shard_00000.safetensors": large}, {}, {})
    with ThreadPoolExecutor(1) as thread:
        saver._writing = thread.submit(saver._write, snapshot, 0.0)
        saver.wait_for_own_files(lambda: signs.append(doing[0]))
    assert signs.count("writing") > 2  # not only that it is there, and gone


def test_waiting_signals_activity_only_while_a_file_grows_or_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[str] = []
    told = threading.Condition()
    doing = "growing"

    def sign() -> None:
        with told:
            signs.append(doing)
            told.notify()

    def told_of(what: str) -> bool:
        with told:
            return told.wait_for(lambda: what in signs, timeout=30)

    def slowly(_tensors: object, path: Path, **_: object) -> None:
        nonlocal doing
        with path.open("wb") as file:
            while not told_of_growth(file):
                pass
        doing = "standing still"
        time.sleep(0.3)
        doing = "reading"

    def told_of_growth(file: BinaryIO) -> bool:
        file.write(b"some")
        file.flush()
        time.sleep(0.02)
        return "growing" in signs

    def summed(_path: Path, heartbeat: Callable[[], None]) -> str:
        heartbeat()
        assert told_of("reading")
        return "0" * 64

    monkeypatch.setattr("dinoscale.checkpoint.save.write_tensors", slowly)
    monkeypatch.setattr("dinoscale.checkpoint.save.flushed_sum", summed)
    monkeypatch.setattr("dinoscale.checkpoint.save._POLL_S", 0.01)
    saver = Saver(tmp_path, Keep(last=1))
    saver._own_files = Future()
    snapshot = _Snapshot(1, 0, {"shard_00000.safetensors": {}}, {}, {})
    with ThreadPoolExecutor(1) as thread:
        saver._writing = thread.submit(saver._write, snapshot, 0.0)
        saver.wait_for_own_files(sign)
    assert set(signs) == {"growing", "reading"}
