"""How often a thousand ranks ask the store in which they met, counted on a stand-in for it."""

import json
import threading
import time
from typing import Any

import pytest

from dinoscale.runtime import watchdog as watchdog_module
from dinoscale.runtime.distributed import Board
from dinoscale.runtime.watchdog import Watchdog, explain_hang

RANKS = 1000
HOSTS = [f"node{rank // 8}" for rank in range(RANKS)]


class CountingStore:
    """As a TCPStore: every call is a request, and asking for what is not there would block."""

    def __init__(self) -> None:
        self.texts: dict[str, bytes] = {}
        self.requests = 0

    def set(self, key: str, text: str) -> None:
        self.requests += 1
        self.texts[key] = text.encode()

    def compare_set(self, key: str, expected: str, text: str) -> bytes:
        self.requests += 1
        assert expected == ""
        return self.texts.setdefault(key, text.encode())

    def add(self, key: str, more: int) -> int:
        self.requests += 1
        self.texts[key] = str(int(self.texts.get(key, b"0")) + more).encode()
        return int(self.texts[key])

    def check(self, keys: list[str]) -> bool:
        self.requests += 1
        return all(key in self.texts for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.requests += 1
        return [self.texts[key] for key in keys]

    def delete_key(self, key: str) -> None:
        self.requests += 1
        del self.texts[key]


def _board(store: CountingStore) -> Board:
    board = Board()
    board._store = store
    return board


def test_texts_of_a_thousand_ranks_take_two_requests_and_missing_ones_a_few_more() -> None:
    store = CountingStore()
    board, keys = _board(store), [f"alive/{rank}" for rank in range(RANKS)]
    for key in keys:
        board.post(key, key)
    store.requests = 0
    assert board.read_all(keys) == keys
    assert store.requests == 2
    board.forget(keys[500:503])
    store.requests = 0
    texts = board.read_all(keys)
    assert [key for key, text in zip(keys, texts, strict=True) if text is None] == keys[500:503]
    assert store.requests < 60


def test_waiting_asks_less_and_less_often() -> None:
    store = CountingStore()
    board, begin = _board(store), time.monotonic()
    threading.Timer(1.0, lambda: board.post("save/3", "")).start()
    assert board.wait_for(["save/3"]) == [""]
    assert store.requests < 12  # 20 a second before
    assert time.monotonic() - begin < 60


def _watchdog(store: CountingStore, rank: int) -> Any:
    watchdog: Any = Watchdog(timeout_s=60, hosts=HOSTS, launched=False, ask_to_stop=print)
    watchdog._stop.set()  # what is counted is the verdict
    watchdog._number, watchdog._rank, watchdog._board = 0, rank, _board(store)
    return watchdog


def test_one_rank_looks_at_all_and_the_others_repeat_its_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog_module, "_LOOKS_APART_S", 0.0)
    store = CountingStore()
    for rank in range(RANKS):
        sign = [4 if rank == 77 else 5, f"in step {4 if rank == 77 else 5}", 9]
        store.texts[f"job/0/alive/{rank}"] = json.dumps(sign).encode()
    verdicts = []
    for rank in (3, 4):
        watchdog, store.requests = _watchdog(store, rank), 0
        verdicts.append(watchdog._verdict(explain_hang))
        assert store.requests <= 10
    assert verdicts[0] == verdicts[1]
