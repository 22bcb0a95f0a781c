"""Number of requests of a thousand ranks to the store where they met, counted on a fake store."""

import json
import threading
import time
from typing import Any

import pytest

from dinoscale.runtime import watchdog as watchdog_module
from dinoscale.runtime.distributed import KeyValueStore
from dinoscale.runtime.watchdog import Watchdog, explain_hang

RANKS = 1000
HOSTS = [f"node{rank // 8}" for rank in range(RANKS)]


class CountingStore:
    """A TCPStore in which every call counts as a request; reading a missing key fails."""

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


def _connected(store: CountingStore) -> KeyValueStore:
    shared = KeyValueStore()
    shared._store = store
    return shared


def test_texts_of_a_thousand_ranks_take_two_requests_and_missing_ones_a_few_more() -> None:
    store = CountingStore()
    shared, keys = _connected(store), [f"alive/{rank}" for rank in range(RANKS)]
    for key in keys:
        shared.set(key, key)
    store.requests = 0
    assert shared.get_all(keys) == keys
    assert store.requests == 2
    shared.delete(keys[500:503])
    store.requests = 0
    texts = shared.get_all(keys)
    assert [key for key, text in zip(keys, texts, strict=True) if text is None] == keys[500:503]
    assert store.requests < 60


def test_waiting_polls_with_growing_pauses() -> None:
    store = CountingStore()
    shared, begin = _connected(store), time.monotonic()
    threading.Timer(1.0, lambda: shared.set("save/3", "")).start()
    assert shared.wait_for(["save/3"]) == [""]
    assert store.requests < 12  # 20 a second before
    assert time.monotonic() - begin < 60


def _watchdog(store: CountingStore, rank: int) -> Any:
    watchdog: Any = Watchdog(timeout_s=60, hosts=HOSTS, launched=False, ask_to_stop=print)
    watchdog._stop.set()  # only requests of the verdict are counted
    watchdog._number, watchdog._rank, watchdog._store = 0, rank, _connected(store)
    return watchdog


def test_one_rank_reads_the_status_of_all_and_the_others_repeat_its_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog_module, "_READS_APART_S", 0.0)
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
