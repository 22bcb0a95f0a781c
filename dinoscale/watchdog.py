"""Ends a job that hangs or has lost a rank, and says which rank and where.

Every rank posts what it is doing on the board. A rank whose training has not moved for the time
allowed looks up what the others posted, names those that are behind or silent, and exits; so does
every other rank, as all wait for each other.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dinoscale import distributed, logs
from dinoscale.errors import LostPeerError, RunFailedError
from dinoscale.hosts import ranks_text

POST_S = 1.0
_ORPHAN_S = 30.0  # to finish the step and save; launchers allow as much
_ASK_S = 10.0  # for the answer of a board that may be gone
_LINGER_S = 3.0
_ALIVE, _ENDED = "alive/", "ended/"

T = TypeVar("T")


@dataclass(frozen=True)
class Sign:
    """What a rank last posted.

    Attributes:
        moves: how often its training has moved on; grows together on all ranks.
        doing: in words.
        posts: how often it has posted; grows while the process lives.
    """

    moves: int
    doing: str
    posts: int


class Watchdog:
    """Watches the training of this process from a thread."""

    def __init__(
        self,
        *,
        timeout_s: float,
        hosts: Sequence[str],
        launched: bool,
        ask_to_stop: Callable[[str], None],
    ) -> None:
        """Start to watch.

        Args:
            timeout_s: without a `moved` for so long, the process ends.
            hosts: of all ranks, to name them.
            launched: a launcher is the parent; without it nobody would end this process.
            ask_to_stop: called with the reason when the launcher is gone, so that the run saves
                and ends; if it does not, the process ends half a minute later.
        """
        self._timeout_s, self._hosts, self._ask_to_stop = timeout_s, hosts, ask_to_stop
        self._board = distributed.Board()
        self._moves, self._doing, self._since = 0, "starting", time.monotonic()
        self._stop = threading.Event()
        self._ancestors = _ancestors() if launched else []
        threading.Thread(target=self._post, name="signs of life", daemon=True).start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def moved(self, doing: str) -> None:
        """Say that training goes on, and what it does next."""
        self._moves, self._doing, self._since = self._moves + 1, doing, time.monotonic()

    def goes_on(self) -> None:
        """Say that what was begun goes on; the number of these may differ between ranks."""
        self._since = time.monotonic()

    def close(self) -> None:
        """Watch no longer."""
        self._stop.set()

    def say_why(self, reason: str) -> None:
        """Tell the other ranks why this one ends, if they can still be told."""
        _bounded(lambda: self._board.post(f"{_ENDED}{distributed.rank()}", reason), default=None)

    def missing(self) -> str:
        """After a lost contact: which ranks are gone, in words; takes some seconds."""
        before = self._ask()
        time.sleep(2.5 * POST_S)
        said = explain_missing(before, self._ask(), self._read_all(_ENDED), self._hosts)
        _linger()
        return said

    def _post(self) -> None:
        posts = 0
        while not self._stop.is_set():
            posts += 1
            text = json.dumps([self._moves, self._doing, posts])
            with contextlib.suppress(LostPeerError):  # training will notice
                self._board.post(f"{_ALIVE}{distributed.rank()}", text)
            self._stop.wait(POST_S)

    def _watch(self) -> None:
        while not self._stop.wait(POST_S / 2):
            if self._ancestors and _ancestors() != self._ancestors:
                self._ask_to_stop("the launcher is gone")
                if not self._stop.wait(_ORPHAN_S):
                    _end("the launcher of this process is gone, and the run did not end by itself")
                return
            idle_s = time.monotonic() - self._since
            if idle_s > self._timeout_s:
                before = self._ask()
                time.sleep(2.5 * POST_S)
                reason = explain_hang(before, self._ask(), self._hosts)
                own = ranks_text([distributed.rank()], self._hosts)
                _end(
                    f"{own} has not moved for {idle_s:.0f} s"
                    f" (train.hang_timeout_s={self._timeout_s:g}), {self._doing}; {reason}"
                )

    def _ask(self) -> list[Sign | None]:
        """What every rank last posted; all None if the board does not answer."""
        texts = self._read_all(_ALIVE)
        return [None if text is None else Sign(*json.loads(text)) for text in texts]

    def _read_all(self, prefix: str) -> list[str | None]:
        ranks = range(distributed.world_size())
        return _bounded(
            lambda: [self._board.read(f"{prefix}{rank}") for rank in ranks],
            default=[None for _ in ranks],
        )


def explain_missing(
    before: Sequence[Sign | None],
    after: Sequence[Sign | None],
    reasons: Sequence[str | None],
    hosts: Sequence[str],
) -> str:
    """Which ranks stopped posting between two looks, and what they said when they ended."""
    if all(sign is None for sign in after):
        return f"rank 0 ({hosts[0]}), where the ranks meet, is gone; its output says why"
    said = [f"{ranks_text([r], hosts)} ended: {text}" for r, text in enumerate(reasons) if text]
    silent = {r: doing for r, doing in _silent(before, after).items() if not reasons[r]}
    said += _each(silent, hosts, "is gone", "are gone")
    return "; ".join(said) or "all ranks still answer: the network between them failed"


def explain_hang(
    before: Sequence[Sign | None], after: Sequence[Sign | None], hosts: Sequence[str]
) -> str:
    """Which ranks hold up the others: those that do not answer, else those that are behind."""
    known = [sign for sign in after if sign is not None]
    if not known:
        return f"rank 0 ({hosts[0]}), where the ranks meet, does not answer"
    frozen = _each(_silent(before, after), hosts, "does not answer", "do not answer")
    least = min(sign.moves for sign in known)
    if frozen or least == max(sign.moves for sign in known):
        return "; ".join(frozen) or "all ranks answer and none is ahead of the others"
    behind = [
        f"{ranks_text([r], hosts)} is behind the others, {now.doing}"
        for r, now in enumerate(after)
        if now is not None and now.moves == least
    ]
    return "; ".join(behind)


def _each(doing: Mapping[int, str], hosts: Sequence[str], one: str, many: str) -> list[str]:
    """What is with these ranks and what they did last; those of a node that died in one."""
    of_doing: dict[str, list[int]] = {}
    for rank, what in doing.items():
        of_doing.setdefault(what, []).append(rank)
    return [
        f"{ranks_text(ranks, hosts)} "
        + (f"{one}, it was {what}" if len(ranks) == 1 else f"{many}, they were {what}")
        for what, ranks in of_doing.items()
    ]


def _silent(before: Sequence[Sign | None], after: Sequence[Sign | None]) -> dict[int, str]:
    """Ranks that posted nothing between two looks, and what they had said they were doing."""
    return {
        rank: now.doing if now else "starting"
        for rank, (then, now) in enumerate(zip(before, after, strict=True))
        if now is None or (then is not None and then.posts == now.posts)
    }


def _bounded(ask: Callable[[], T], *, default: T) -> T:
    """The answer of `ask`, or `default` if there is none within some seconds."""
    answers: list[T] = []

    def run() -> None:
        with contextlib.suppress(LostPeerError):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_ASK_S)
    return answers[0] if answers else default


def _ancestors() -> list[int]:
    """The parent and, for deepspeed, whose launcher is two processes, the parent's parent."""
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text()
        above = int(stat.rpartition(")")[2].split()[1])
        command = Path(f"/proc/{above}/cmdline").read_bytes()
    except OSError:  # no /proc here, or the process has just gone
        return [parent]
    return [parent, above] if b"deepspeed" in command else [parent]


def _linger() -> None:
    """Let rank 0 stay a little: the board goes with it, and others may still read."""
    if distributed.rank() == 0 and distributed.world_size() > 1:
        time.sleep(_LINGER_S)


def _end(text: str) -> None:
    logs.note(f"error: {text}")
    print(f"error: {text}", file=sys.stderr, flush=True)
    _linger()
    os._exit(RunFailedError.exit_code)
