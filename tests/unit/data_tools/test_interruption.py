"""Whatever stops a tool, and wherever: the same command goes on to the same bytes."""

import fcntl
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.journal import Journal
from data_tools.parallel import ordered_map
from data_tools.shard_writer import plan_shards, write_set
from data_tools.survey import survey
from dinoscale.errors import DataError, RunFailedError
from tests.unit.data_tools.conftest import contents

_SIZES = np.random.default_rng(0).integers(100, 3000, 30)


class _Numbers:
    """Samples of known bytes; the one numbered `stops_at` ends the program instead."""

    def __init__(self, stops_at: int = -1):
        self.stops_at = stops_at
        self.made: list[int] = []

    def members(self, index: int) -> list[tuple[str, bytes]]:
        if index == self.stops_at:
            raise KeyboardInterrupt
        self.made.append(index)
        return [("jpg", bytes([index]) * int(_SIZES[index]))]


def _write(out: Path, samples: _Numbers, **changed: Any) -> dict[str, Any]:
    order = np.random.default_rng(1).permutation(30)
    settings: dict[str, Any] = {
        "names": [f"{i}.jpg" for i in range(30)],
        "classes": b"0\tone\n",
        "settings": {},
        "input": {},
        "module": __name__,
        "workers": 1,
    }
    plans = plan_shards(_SIZES + 512, order, shard_bytes=8000, prefix="train")
    return write_set(out, samples, plans, **{**settings, **changed})


def test_a_copied_set_is_found_whole(tmp_path: Path) -> None:
    shards = _write(tmp_path / "out", _Numbers())["shards"]
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "out").glob("[!.]*"):  # no hidden list of whose the files are
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    assert _write(tmp_path / "copy", _Numbers())["shards_kept"] == len(shards)


@pytest.mark.parametrize("stops_at", range(0, 30, 3))
def test_interrupted_writing_resumes_to_the_same_bytes(tmp_path: Path, stops_at: int) -> None:
    whole = _Numbers()
    _write(tmp_path / "whole", whole)
    out = tmp_path / "out"
    first, second = _Numbers(stops_at), _Numbers()
    with pytest.raises(KeyboardInterrupt):
        _write(out, first)
    assert not (out / "manifest.json").exists()
    finished = [path.name for path in out.glob("*.tar")]
    for name in finished:  # no half file under a final name
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    summary = _write(out, second)
    assert summary["shards_kept"] == len(finished)
    assert len(second.made) <= 30 - len(first.made) + 15  # at most the shard under way again
    assert contents(out) == contents(tmp_path / "whole")


@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=40), limit=st.integers(1, 20_000)
)
def test_plan_puts_every_sample_in_one_shard_of_the_size(sizes: list[int], limit: int) -> None:
    every = np.array(sizes)
    order = np.random.default_rng(2).permutation(len(sizes))
    plans = plan_shards(every, order, shard_bytes=limit, prefix="x")
    assert [i for plan in plans for i in plan.ids] == list(order)
    totals = [int(every[plan.ids].sum()) for plan in plans]
    assert all(
        total <= limit or len(plan.ids) == 1 for total, plan in zip(totals, plans, strict=True)
    )
    for total, after in zip(totals[:-1], plans[1:], strict=True):
        assert total + every[after.ids[0]] > limit
    assert [plan.first_key for plan in plans] == [
        sum(len(p.ids) for p in plans[:n]) for n in range(len(plans))
    ]


def test_sample_larger_than_a_shard_has_one_of_its_own() -> None:
    plans = plan_shards(np.array([5, 500, 5]), np.arange(3), shard_bytes=100, prefix="x")
    assert [plan.ids.tolist() for plan in plans] == [[0], [1], [2]]


def test_second_process_at_the_same_work_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        _write(out, _Numbers(20))
    with (out / ".progress.jsonl").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            _write(out, _Numbers())


def test_journal_forgets_a_cut_off_line_and_other_work(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, "work")
    for piece in range(3):
        journal.add(piece, {"value": piece})
    whole = path.read_bytes()
    del journal
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        complete = max(0, whole[:end].count(b"\n") - 1)
        again = Journal(path, "work")
        assert again.done == {piece: {"value": piece} for piece in range(complete)}
        again.add(7, {"value": 7})
        assert json.loads(path.read_bytes().splitlines()[-1])["piece"] == 7
        del again
    assert Journal(path, "other work").done == {}


def _count(counter: Path, piece: int) -> dict[str, Any]:
    with counter.open("a") as file:
        file.write(f"{piece}\n")
    if piece == 3 and counter.read_text().count("3") == 1:
        raise KeyboardInterrupt
    return {"piece": piece}


def test_survey_resumes_after_the_last_finished_block(tmp_path: Path) -> None:
    counter, out = tmp_path / "counter", tmp_path / "out.jsonl"

    def run(work: str) -> list[dict[str, Any]]:
        return list(
            survey(_count, counter, range(5), sizes=[1] * 5, out=out, work=[work], workers=1)
        )

    with pytest.raises(KeyboardInterrupt):
        run("a")
    assert (tmp_path / "out.jsonl.state").exists()
    assert run("a") == [{"piece": piece} for piece in range(5)]
    assert counter.read_text().split() == ["0", "1", "2", "3", "3", "4"]
    assert not (tmp_path / "out.jsonl.state").exists()


def _kill_self(_: None, piece: int) -> int:
    if piece == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return piece


def test_killed_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(RunFailedError, match="fewer --workers"):
        list(ordered_map(_kill_self, None, range(8), workers=2))


def _interrupt_self(_: None, piece: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return piece


def test_interrupt_is_for_the_first_process_alone() -> None:
    assert list(ordered_map(_interrupt_self, None, range(4), workers=2)) == list(range(4))


def _square(shared: int, piece: int) -> int:
    return shared + piece**2


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_pieces(workers: int) -> None:
    found = list(ordered_map(_square, 5, range(40), workers=workers))
    assert found == [5 + piece**2 for piece in range(40)]
