"""Ends a job that hangs, has lost a rank or in which one fails, and says which rank and where.

Every rank posts what it is doing on the board. A rank that fails posts why, under a key at which
all look every second, and all end. A rank whose training has not moved for the time allowed, or
that has lost contact, asks for a verdict: the first to ask looks up what all have posted, names
those that are behind or silent, and posts that as the reason.
"""

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dinoscale.errors import DinoscaleError, LostPeerError, PreemptedError, RunFailedError
from dinoscale.runtime import distributed, logs
from dinoscale.runtime.hosts import ranks_text

POST_S = 1.0
_ORPHAN_S = 30.0  # to finish the step and save; launchers allow as much
_ASK_S = 10.0  # for the answer of a board that may be gone
_LOOKS_APART_S = 2.5 * POST_S  # so that every rank that lives posts in between
_GRACE_S = 3.0  # to end by itself, once the job has failed elsewhere
_LINGER_S = 3.0  # at most, until all have read why
_GONE_AFTER = 5  # posts in a row that failed
_LOOK_AT_ALL = 5  # posts between two looks of rank 0 at what all have posted
# Without a new sign from a rank it counts as gone. Not sooner: a call that holds the interpreter,
# as the loading of a library over a slow network, silences a process that lives.
_SILENT_S = 60.0
_BY_HAND = 130  # exit code, as a shell has it
_LAST = 0  # number of the post with which a rank leaves in good order
# From the moment when a rank has not moved for too long to that when the last one has ended.
_LONGEST_END_S = 7 * _ASK_S + _LOOKS_APART_S + _GRACE_S + _LINGER_S
_numbers = itertools.count()  # of watchdogs of this process; equal on all ranks
_ALIVE, _ENDED, _ASKED, _HEARD = "alive/", "ended", "asked for a verdict", "heard of the end"

T = TypeVar("T")
_Signs = Sequence["Sign | None"]  # of all ranks


@dataclass(frozen=True)
class Sign:
    """What a rank last posted.

    Attributes:
        moves: how often its training has moved on; grows together on all ranks.
        doing: in words.
        posts: how often it has posted; grows while the process lives, 0 once it has left.
    """

    moves: int
    doing: str
    posts: int


@dataclass(frozen=True)
class _End:
    """Why the job ends, the same for all ranks: a sentence, and the exit code."""

    text: str
    code: int


class Watchdog:
    """Watches the work of this process, and how the others fare, from threads."""

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
        self._rank, self._board = distributed.rank(), distributed.Board()
        self._own = ranks_text([self._rank], hosts)
        self._moves, self._doing, self._since = 0, "starting", time.monotonic()
        self._stop, self._leaving, self._lock = threading.Event(), False, threading.Lock()
        self._end: _End | None = None
        self._number = next(_numbers)
        self._ancestors = _ancestors() if launched else []
        self._poster = threading.Thread(target=self._post, name="signs of life", daemon=True)
        self._poster.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def moved(self, doing: str) -> None:
        """Say that training goes on, and what it does next."""
        self._moves, self._doing, self._since = self._moves + 1, doing, time.monotonic()

    def goes_on(self) -> None:
        """Say that what was begun goes on; the number of these may differ between ranks."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def spreading(self) -> Iterator[None]:
        """Watch what is done inside: why it fails reaches the other ranks within seconds.

        Raises:
            RunFailedError: contact was lost; the text says which rank is gone, or why it ended.
            Exception: what was raised inside.
        """
        try:
            yield
        except LostPeerError as lost:
            self._leaving = True
            end = self._verdict(explain_missing)
            self._linger()
            error = RunFailedError(f"{lost}: {end.text}")
            error.exit_code = end.code
            raise error from lost
        except PreemptedError:  # all ranks end so, together
            self._farewell()
            raise
        except BaseException as error:
            self._leaving = True
            self._settle(_ended(self._own, error))
            self._linger()
            raise
        else:
            self._farewell()
        finally:
            self._stop.set()

    def _farewell(self) -> None:
        """Post that no more signs will come: others may take longer, and are not to wonder."""
        self._stop.set()
        self._poster.join(_ASK_S)  # its last sign would undo this one
        _bounded(lambda: self._post_sign(_LAST), default=None)

    def _key(self, name: str) -> str:
        return f"job/{self._number}/{name}"

    def _post(self) -> None:
        """Post signs of life, and look whether the job has come to its end."""
        posts, failures = 0, 0
        others = _Silence(len(self._hosts)) if self._rank == 0 and len(self._hosts) > 1 else None
        while not self._stop.is_set():
            posts += 1
            try:
                self._post_sign(posts)
                self._look()
                if others is not None and posts % _LOOK_AT_ALL == 0 and self._end is None:
                    self._settle_if(others.seen(self._read_signs()))
                failures = 0
            except LostPeerError:
                failures += 1
                if failures == _GONE_AFTER and self._end is None:
                    nothing: _Signs = [None for _ in self._hosts]
                    text = explain_missing(nothing, nothing, self._hosts)
                    self._end = _End(text, RunFailedError.exit_code)
            self._stop.wait(POST_S)

    def _post_sign(self, posts: int) -> None:
        text = json.dumps([self._moves, self._doing, posts])
        self._board.post(self._key(f"{_ALIVE}{self._rank}"), text)

    def _settle_if(self, silent: Mapping[int, str]) -> None:
        """Rank 0: end the job if ranks died of which nobody has heard, as amid NCCL's work."""
        if silent and not self._leaving:
            text = "; ".join(_each(silent, self._hosts, "is gone", "are gone"))
            said = f"{text} (no sign of life for {_SILENT_S:.0f} s)"
            self._settle(_End(said, RunFailedError.exit_code))

    def _look(self) -> bool:
        """Read why the job ends, if it does; true, as the board has answered."""
        text = self._board.read(self._key(_ENDED)) if self._end is None else None
        if text is not None:
            self._heard(_End(*json.loads(text)))
        return True

    def _heard(self, end: _End) -> None:
        """Take note of why the job ends, once, and tell rank 0 that it need not stay for this."""
        with self._lock:
            known, self._end = self._end is not None, self._end or end
        if not known:
            self._board.count(self._key(_HEARD))

    def _watch(self) -> None:
        while not self._stop.wait(POST_S / 2):
            if self._ancestors and _ancestors() != self._ancestors:
                self._ask_to_stop("the launcher is gone")
                if not self._stop.wait(_ORPHAN_S):
                    self._exit(
                        "the launcher of this process is gone, and the run did not end by itself"
                    )
                return
            idle_s = time.monotonic() - self._since
            if self._end is not None:
                if not self._stop.wait(_GRACE_S) and not self._leaving:
                    self._exit(f"{self._own} ends with the others: {self._end.text}")
            elif idle_s > self._timeout_s and not self._leaving:
                said = (
                    f"{self._own} has not moved for {idle_s:.0f} s"
                    f" (train.hang_timeout_s={self._timeout_s:g}), {self._doing}"
                )
                end = self._verdict(explain_hang)
                self._exit(f"{said}; {end.text}")

    def _verdict(self, explain: Callable[[_Signs, _Signs, Sequence[str]], str]) -> _End:
        """Why the job ends: as a rank that failed has said, or as the first that asks finds out.

        Looking at all ranks is for one of them: a thousand at once would be more than the board can
        answer in time.
        """
        nothing: _Signs = [None for _ in self._hosts]
        if not _bounded(self._look, default=False):
            return _End(explain(nothing, nothing, self._hosts), RunFailedError.exit_code)
        asked = _bounded(lambda: self._board.count(self._key(_ASKED)), default=1)
        deadline = time.monotonic() + 3 * _ASK_S + _LOOKS_APART_S
        while asked > 1 and self._end is None and time.monotonic() < deadline:
            time.sleep(POST_S / 5)  # the other thread looks
        if self._end is None:
            before = self._signs()
            time.sleep(_LOOKS_APART_S)
            text = explain(before, self._signs(), self._hosts)
            self._settle(_End(text, RunFailedError.exit_code))
        assert self._end is not None
        return self._end

    def _settle(self, end: _End) -> None:
        """Post why the job ends; if another rank was first, its reason is the one."""

        def post() -> _End:
            text = json.dumps([end.text, end.code])
            return _End(*json.loads(self._board.post_first(self._key(_ENDED), text)))

        agreed = _bounded(post, default=end)
        _bounded(lambda: self._heard(agreed), default=None)

    def _signs(self) -> list[Sign | None]:
        """What every rank last posted; all None if the board does not answer."""
        nothing: list[Sign | None] = [None for _ in self._hosts]
        return _bounded(self._read_signs, default=nothing)

    def _read_signs(self) -> list[Sign | None]:
        keys = [self._key(f"{_ALIVE}{rank}") for rank in range(len(self._hosts))]
        texts = self._board.read_all(keys)
        return [None if text is None else Sign(*json.loads(text)) for text in texts]

    def _exit(self, text: str) -> None:
        try:
            logs.last_words(f"error: {text}")
            self._linger()
        finally:
            os._exit(RunFailedError.exit_code if self._end is None else self._end.code)

    def _linger(self) -> None:
        """Let rank 0 stay a little: the board goes with it, and others have still to read."""
        if self._rank != 0 or len(self._hosts) == 1:
            return
        deadline = time.monotonic() + _LINGER_S
        while time.monotonic() < deadline:
            count = _bounded(lambda: self._board.count(self._key(_HEARD), 0), default=0)
            if count >= len(self._hosts):
                return
            time.sleep(POST_S / 10)


class _Silence:
    """How often ranks were looked at in vain.

    Looks are counted, not seconds: who was suspended with the whole job, and wakes first, does not
    take the others for dead.
    """

    def __init__(self, num_ranks: int) -> None:
        self._posts: list[int | None] = [None] * num_ranks
        self._in_vain = [0] * num_ranks

    def seen(self, signs: _Signs) -> dict[int, str]:
        """Take note of what all have posted; who has been silent for too long, and did what."""
        silent = {}
        for rank, sign in enumerate(signs):
            posts = None if sign is None else sign.posts
            new = posts != self._posts[rank] or posts == _LAST
            self._posts[rank] = posts
            self._in_vain[rank] = 0 if new else self._in_vain[rank] + 1
            if self._in_vain[rank] * _LOOK_AT_ALL * POST_S >= _SILENT_S:
                silent[rank] = "starting" if sign is None else sign.doing
        return silent


def _ended(own: str, error: BaseException) -> _End:
    """What the others hear of an error of this rank."""
    if isinstance(error, KeyboardInterrupt):
        return _End(f"{own} was interrupted by hand", _BY_HAND)
    if isinstance(error, DinoscaleError):
        return _End(f"{own} ended: {error}", error.exit_code)
    return _End(f"{own} ended: {type(error).__name__}: {error}", RunFailedError.exit_code)


def collectives_timeout_s(hang_timeout_s: float) -> float:
    """Seconds after which a collective may give up: later than a watchdog has ended all ranks."""
    return hang_timeout_s + _LONGEST_END_S


def explain_missing(
    before: Sequence[Sign | None], after: Sequence[Sign | None], hosts: Sequence[str]
) -> str:
    """Which ranks stopped posting between two looks."""
    if all(sign is None for sign in after):
        return f"rank 0 ({hosts[0]}), where the ranks meet, is gone; its output says why"
    said = _each(_silent(before, after), hosts, "is gone", "are gone")
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
        if now is None or (then is not None and then.posts == now.posts != _LAST)
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
