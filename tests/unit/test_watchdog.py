"""Which rank, and which host, is named when a job hangs or has lost one."""

import json
import os
import threading
import time

import pytest

from dinoscale.runtime import watchdog as watchdog_module
from dinoscale.runtime.watchdog import RankStatus, Watchdog, explain_hang, explain_missing

WAITS = RankStatus(progress=9, doing="in step 5", posts=40)
STILL = RankStatus(progress=9, doing="in step 5", posts=42)
BEHIND = RankStatus(progress=8, doing="waiting for the images of step 5", posts=42)
HOSTS = ["a", "b"]
TWO_NODES = ["a", "a", "b", "b"]


def test_rank_that_is_behind_is_named_with_what_it_does() -> None:
    said = explain_hang([WAITS, WAITS, WAITS], [STILL, BEHIND, STILL], ["a", "b", "c"])
    assert said == "rank 1 (b) is behind the others, waiting for the images of step 5"


def test_rank_that_does_not_answer_is_named() -> None:
    said = explain_hang([WAITS, WAITS], [STILL, WAITS], HOSTS)
    assert said == "rank 1 (b) does not answer (last seen in step 5)"
    said = explain_hang([WAITS, None], [STILL, None], HOSTS)
    assert said == "rank 1 (b) does not answer (last seen starting)"


def test_without_any_answer_rank_0_and_its_host_are_named() -> None:
    assert "rank 0 (a)" in explain_hang([None, None], [None, None], HOSTS)
    assert "rank 0 (a)" in explain_missing([None, None], [None, None], HOSTS)


def test_ranks_that_wait_for_each_other_are_not_blamed() -> None:
    assert "none is ahead" in explain_hang([WAITS, WAITS], [STILL, STILL], HOSTS)


def test_rank_that_is_gone_is_named() -> None:
    said = explain_missing([WAITS, WAITS], [STILL, WAITS], HOSTS)
    assert said == "rank 1 (b) is gone (last seen in step 5)"


def test_node_that_is_gone_is_one_phrase() -> None:
    before, after = [WAITS] * 4, [STILL, STILL, WAITS, WAITS]
    said = explain_missing(before, after, TWO_NODES)
    assert said == "ranks 2-3 (b) are gone (last seen in step 5)"
    said = explain_hang(before, after, TWO_NODES)
    assert said == "ranks 2-3 (b) do not answer (last seen in step 5)"


def test_if_all_ranks_answer_the_network_is_named() -> None:
    said = explain_missing([WAITS, WAITS], [STILL, STILL], HOSTS)
    assert "network" in said


def test_rank_that_died_unnoticed_ends_the_job_and_one_that_has_left_does_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("POST_S", 0.02), ("_SILENT_S", 0.3), ("_GRACE_S", 0.0), ("_LINGER_S", 0)):
        monkeypatch.setattr(watchdog_module, name, value)
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        threading.Event().wait()  # the thread alone ends

    monkeypatch.setattr(os, "_exit", end)
    watchdog = Watchdog(timeout_s=600, hosts=["a", "b", "c"], launched=False, ask_to_stop=print)
    for rank, posts in ((1, 7), (2, 0)):
        sign = json.dumps([3, "in step 5", posts])
        watchdog._store.set(watchdog._key(f"alive/{rank}"), sign)
    deadline = time.monotonic() + 20
    while not codes and time.monotonic() < deadline:
        time.sleep(0.01)
    watchdog._stop.set()
    assert codes[:1] == [1]
    said = capfd.readouterr().err.splitlines()[0]
    assert said == (
        "error: rank 0 (a) ends with the others: rank 1 (b) is gone (last seen in step 5)"
        ": no heartbeat for 0 s"
    )


def test_interruption_by_hand_is_shared_with_its_exit_code() -> None:
    watchdog = Watchdog(timeout_s=600, hosts=["a"], launched=False, ask_to_stop=print)
    with pytest.raises(KeyboardInterrupt), watchdog.sharing_failure():
        raise KeyboardInterrupt
    told = watchdog._store.get(watchdog._key("ended"))
    assert json.loads(told or "null") == ["rank 0 (a) was interrupted by hand", 130]


def test_last_post_of_a_rank_says_that_it_has_left() -> None:
    watchdog = Watchdog(timeout_s=600, hosts=["a"], launched=False, ask_to_stop=print)
    with watchdog.sharing_failure():
        watchdog.progress("in step 5")
    sign = RankStatus(*json.loads(watchdog._store.get(watchdog._key("alive/0")) or "null"))
    assert explain_missing([sign, WAITS], [sign, STILL], HOSTS).startswith("all ranks still answer")
