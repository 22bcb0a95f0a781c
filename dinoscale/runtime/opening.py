"""Work of some ranks that may take long while others wait, such as opening the images of a job.

Those are listed and indexed once on each node: its first rank opens them, the others wait and open
what it found by its files. Waiting is no collective, which would end after some minutes: ranks look
at the board. What rank 0 leaves there changes as long as any rank that works goes on, and that is
what the watchdogs of the others hear.
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

_FIRST_LOOK_S, _LOOK_S = 0.02, 1.0  # between two looks at the board: at first, and at most
_SIGN_S = 1.0  # between two signs left there
_DONE = "done"


def open_once_a_node(
    open_source: Callable[[Callable[[], None]], T],
    hosts: Sequence[str] | None = None,
    goes_on: Callable[[], None] = lambda: None,
    *,
    patience_s: float = math.inf,
) -> T:
    """Open a source on the first rank of each node, and share it with the others.

    All ranks call it together.

    Args:
        open_source: takes what it calls again and again while it works.
        hosts: of all ranks; None asks them.
        goes_on: tells the watchdog of this rank.
        patience_s: for ranks that give no sign of life.

    Raises:
        DinoscaleError: on every rank, if it cannot be opened on one node.
        RunFailedError: a rank gave no sign for so long.
    """
    if distributed.world_size() == 1:
        return open_source(goes_on)
    hosts = distributed.gather_objects(socket.gethostname()) if hosts is None else hosts
    first = hosts.index(hosts[distributed.rank()])
    opening = {hosts.index(host) for host in hosts}
    source = _done_by(opening, open_source, goes_on, patience_s=patience_s)
    shared = "" if source is None else _put_aside(source)
    try:
        paths = distributed.gather_objects(shared)
        taken = distributed.together(lambda: _taken(paths[first]) if source is None else source)
        lacking = {i for i, lacks in enumerate(distributed.gather_objects(taken is None)) if lacks}
    finally:
        if shared:
            os.unlink(shared)
    if lacking:  # they list everything again
        opened = _done_by(lacking, open_source, goes_on, patience_s=patience_s)
        taken = opened if taken is None else taken
    assert taken is not None
    return taken


def on_first_rank(
    work: Callable[[Callable[[], None]], T], goes_on: Callable[[], None] = lambda: None
) -> T | None:
    """What rank 0 makes, which may take long; None on the others, which hear its signs of life.

    All ranks call it together.

    Args:
        work: takes what it calls again and again while it works.
        goes_on: tells the watchdog of this rank.

    Raises:
        DinoscaleError: on every rank, if it fails.
    """
    if distributed.world_size() == 1:
        return work(goes_on)
    return _done_by({0}, work, goes_on)


def by_all(
    work: Callable[[Callable[[], None]], T],
    goes_on: Callable[[], None],
    done: Callable[[], None] = lambda: None,
) -> T:
    """What each rank makes; who is done waits for the others, and hears their signs of life.

    All ranks call it together.

    Args:
        work: takes what it calls again and again while it works.
        goes_on: tells the watchdog of this rank.
        done: called where this rank has done its part.

    Raises:
        DinoscaleError: on every rank, if one of them fails.
    """

    def worked(sign: Callable[[], None]) -> tuple[T]:
        made = work(sign)
        done()
        return (made,)

    if distributed.world_size() == 1:
        return worked(goes_on)[0]
    made = _done_by(range(distributed.world_size()), worked, goes_on)
    assert made is not None
    return made[0]


def _done_by(
    ranks: Collection[int],
    work: Callable[[Callable[[], None]], T],
    goes_on: Callable[[], None],
    *,
    patience_s: float = math.inf,
) -> T | None:
    """What these ranks make, while the others wait; None on the others.

    Raises:
        DinoscaleError: on every rank, if one of them fails.
        RunFailedError: one gave no sign of life for `patience_s`.
    """
    signs = _Signs(distributed.broadcast_object(uuid.uuid4().hex), goes_on, posting={0, *ranks})
    rank = distributed.rank()
    made, error = None, None
    try:
        if rank in ranks:
            made = work(signs.sign)
    except Exception as caught:  # whatever it is, the others wait for the verdict
        error = caught
    if rank in ranks and rank:
        signs.done()
    signs.wait_for(sorted({*ranks} - {0}) if rank == 0 else [0], patience_s)
    if rank == 0:
        signs.done()

    def result() -> T | None:
        if error is not None:
            raise error
        return made

    made = distributed.together(result)
    signs.forget()  # of a save among thousands
    return made


class _Signs:
    """Signs that ranks leave for each other while some of them work: any text that changes."""

    def __init__(self, name: str, goes_on: Callable[[], None], posting: Collection[int]) -> None:
        """`name` is that of this opening; `goes_on` is called for every sign, own or other's.

        Signs of the ranks `posting` are read by others, and only these are left.
        """
        self._board, self._name, self._goes_on = distributed.Board(), name, goes_on
        self._signs, self._posts = 0, distributed.rank() in posting
        self._left = float("-inf" if self._posts else "inf")

    def sign(self) -> None:
        """Leave a sign that this rank goes on, once in a while; none after the last one.

        One that nobody reads is for this rank's watchdog alone.
        """
        self._goes_on()
        if time.monotonic() > self._left + _SIGN_S:
            self._signs, self._left = self._signs + 1, time.monotonic()
            self._board.post(self._key(distributed.rank()), str(self._signs))

    def done(self) -> None:
        """Leave the last sign of this rank."""
        self._left = float("inf")
        self._board.post(self._key(distributed.rank()), _DONE)

    def forget(self) -> None:
        """Take the signs of this rank away, once nobody waits for any."""
        if self._posts:
            self._board.forget([self._key(distributed.rank())])

    def wait_for(self, ranks: Sequence[int], patience_s: float) -> None:
        """Wait until these ranks are done; whatever they do meanwhile is a sign of this one.

        Raises:
            RunFailedError: none of them gave a sign for `patience_s`.
        """
        seen: dict[int, str | None] = dict.fromkeys(ranks)
        pause_s, last = _FIRST_LOOK_S, time.monotonic()
        while pending := [rank for rank, text in seen.items() if text != _DONE]:
            texts = self._board.read_all([self._key(rank) for rank in pending])
            for rank, text in zip(pending, texts, strict=True):
                if text != seen[rank]:
                    seen[rank], last = text, time.monotonic()
                    self.sign()
            if time.monotonic() > last + patience_s:
                raise RunFailedError(f"rank {pending[0]} gave no sign of life for {patience_s:g} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_S)

    def _key(self, rank: int) -> str:
        return f"opening/{self._name}/{rank}"


def _put_aside(source: object) -> str:
    """A file that other processes of this node can open the source from; empty if there is none."""
    path = ""
    try:
        descriptor, path = tempfile.mkstemp(".source", "dinoscale-")
        with os.fdopen(descriptor, "wb") as file:
            pickle.dump(source, file)
    except OSError as error:
        log.warning("cannot share what was found with the other ranks of this node (%s)", error)
        if path:
            os.unlink(path)  # of a full disk, cut off
        return ""
    return path


def _taken(path: str) -> Any:
    """What another process of this node put aside; None where its files are not to be seen."""
    if not path or not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return pickle.load(file)  # of this job: readable by its user only
