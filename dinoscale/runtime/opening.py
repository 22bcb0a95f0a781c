"""Long work of some ranks while the others wait, such as opening the images of a job.

Images are listed and indexed once on each node: its first rank opens them, the others wait and then
load what it found from a file. Waiting is no collective, which would time out after some minutes:
ranks poll the store. Heartbeats of ranks that work reach rank 0, whose own heartbeat then keeps the
watchdogs of all waiting ranks quiet.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from dinoscale.errors import RunFailedError
from dinoscale.runtime import distributed

T = TypeVar("T")

log = logging.getLogger(__name__)

_FIRST_POLL_S, _LONGEST_POLL_S = 0.02, 1.0  # between two reads of the store: at first, at most
_BEAT_S = 1.0  # between two heartbeats in the store
_DONE = "done"


def open_once_per_node(
    open_source: Callable[[Callable[[], None]], T],
    hosts: Sequence[str] | None = None,
    heartbeat: Callable[[], None] = lambda: None,
    *,
    timeout_s: float = math.inf,
) -> T:
    """Open a source on the first rank of each node, and share it with the others.

    All ranks call it together.

    Args:
        open_source: takes a heartbeat, which it calls regularly while it works.
        hosts: of all ranks; None asks them.
        heartbeat: of this rank's watchdog.
        timeout_s: how long a rank may be without a heartbeat.

    Raises:
        DinoscaleError: on every rank, if it cannot be opened on one node.
        RunFailedError: a rank gave no heartbeat for so long.
    """
    if distributed.world_size() == 1:
        return open_source(heartbeat)
    hosts = distributed.gather_objects(socket.gethostname()) if hosts is None else hosts
    first = hosts.index(hosts[distributed.rank()])
    opening = {hosts.index(host) for host in hosts}
    source = _done_by(opening, open_source, heartbeat, timeout_s=timeout_s)
    shared = "" if source is None else _write_shared(source)
    try:
        paths = distributed.gather_objects(shared)
        loaded = distributed.together(lambda: _load(paths[first]) if source is None else source)
        lacking = {i for i, lacks in enumerate(distributed.gather_objects(loaded is None)) if lacks}
    finally:
        if shared:
            os.unlink(shared)
    if lacking:  # they list everything again
        opened = _done_by(lacking, open_source, heartbeat, timeout_s=timeout_s)
        loaded = opened if loaded is None else loaded
    assert loaded is not None
    return loaded


def on_first_rank(
    work: Callable[[Callable[[], None]], T], heartbeat: Callable[[], None] = lambda: None
) -> T | None:
    """Do long work on rank 0 and return its result; None on the others, which wait.

    All ranks call it together.

    Args:
        work: takes a heartbeat, which it calls regularly while it works.
        heartbeat: of this rank's watchdog.

    Raises:
        DinoscaleError: on every rank, if it fails.
    """
    if distributed.world_size() == 1:
        return work(heartbeat)
    return _done_by({0}, work, heartbeat)


def on_all_ranks(
    work: Callable[[Callable[[], None]], T],
    heartbeat: Callable[[], None],
    done: Callable[[], None] = lambda: None,
) -> T:
    """Do long work on every rank and return its result, once all ranks are done.

    All ranks call it together.

    Args:
        work: takes a heartbeat, which it calls regularly while it works.
        heartbeat: of this rank's watchdog.
        done: called when this rank has done its part.

    Raises:
        DinoscaleError: on every rank, if one of them fails.
    """

    def worked(beat: Callable[[], None]) -> tuple[T]:
        result = work(beat)
        done()
        return (result,)

    if distributed.world_size() == 1:
        return worked(heartbeat)[0]
    result = _done_by(range(distributed.world_size()), worked, heartbeat)
    assert result is not None
    return result[0]


def _done_by(
    ranks: Collection[int],
    work: Callable[[Callable[[], None]], T],
    heartbeat: Callable[[], None],
    *,
    timeout_s: float = math.inf,
) -> T | None:
    """Do work on these ranks while the others wait, and return its result; None on the others.

    Raises:
        DinoscaleError: on every rank, if one of them fails.
        RunFailedError: one gave no heartbeat for `timeout_s`.
    """
    name = distributed.broadcast_object(uuid.uuid4().hex)
    heartbeats = _Heartbeats(name, heartbeat, posting={0, *ranks})
    rank = distributed.rank()
    made, error = None, None
    try:
        if rank in ranks:
            made = work(heartbeats.beat)
    except Exception as caught:  # whatever it is, the others wait for the verdict
        error = caught
    if rank in ranks and rank:
        heartbeats.done()
    heartbeats.wait_for(sorted({*ranks} - {0}) if rank == 0 else [0], timeout_s)
    if rank == 0:
        heartbeats.done()

    def result() -> T | None:
        if error is not None:
            raise error
        return made

    made = distributed.together(result)
    heartbeats.delete()  # a run saves thousands of times
    return made


class _Heartbeats:
    """Heartbeats of ranks in the store while some of them work: any text that changes."""

    def __init__(self, name: str, heartbeat: Callable[[], None], posting: Collection[int]) -> None:
        """`name` is unique to this work; `heartbeat` is called for every beat, of any rank.

        Only the ranks `posting` write to the store; nobody reads those of others.
        """
        self._store, self._name = distributed.KeyValueStore(), name
        self._heartbeat = heartbeat
        self._num_beats, self._posts = 0, distributed.rank() in posting
        self._last_s = float("-inf" if self._posts else "inf")

    def beat(self) -> None:
        """Tell this rank's watchdog, and once a second the store, that the rank goes on.

        After `done` it no longer writes to the store.
        """
        self._heartbeat()
        if time.monotonic() > self._last_s + _BEAT_S:
            self._num_beats, self._last_s = self._num_beats + 1, time.monotonic()
            self._store.set(self._key(distributed.rank()), str(self._num_beats))

    def done(self) -> None:
        """Write that this rank is done."""
        self._last_s = float("inf")
        self._store.set(self._key(distributed.rank()), _DONE)

    def delete(self) -> None:
        """Delete the key of this rank, once nobody waits for it."""
        if self._posts:
            self._store.delete([self._key(distributed.rank())])

    def wait_for(self, ranks: Sequence[int], timeout_s: float) -> None:
        """Wait until these ranks are done; each of their beats is passed on as one of this rank.

        Raises:
            RunFailedError: none of them gave a heartbeat for `timeout_s`.
        """
        seen: dict[int, str | None] = dict.fromkeys(ranks)
        pause_s, last = _FIRST_POLL_S, time.monotonic()
        while pending := [rank for rank, text in seen.items() if text != _DONE]:
            texts = self._store.get_all([self._key(rank) for rank in pending])
            for rank, text in zip(pending, texts, strict=True):
                if text != seen[rank]:
                    seen[rank], last = text, time.monotonic()
                    self.beat()
            if time.monotonic() > last + timeout_s:
                raise RunFailedError(f"rank {pending[0]} gave no heartbeat for {timeout_s:g} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)

    def _key(self, rank: int) -> str:
        return f"opening/{self._name}/{rank}"


def _write_shared(source: object) -> str:
    """A file from which other processes of this node can load the source; empty without one."""
    path = ""
    try:
        descriptor, path = tempfile.mkstemp(".source", "dinoscale-")
        with os.fdopen(descriptor, "wb") as file:
            pickle.dump(source, file)
    except OSError as error:
        log.warning("cannot share what was found with the other ranks of this node (%s)", error)
        if path:
            os.unlink(path)  # cut off by a full disk
        return ""
    return path


def _load(path: str) -> Any:
    """What another process of this node wrote; None where its file is not visible."""
    if not path or not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return pickle.load(file)  # written by this job, readable by its user only
