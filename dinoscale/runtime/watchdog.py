"""End a job that hangs or in which a rank fails or is lost, and say which rank and where.

Every rank posts its status to the store each second. A rank that fails posts why, under a key that
all read every second, and all end. A rank whose training has made no progress for the time allowed,
or that has lost contact, asks for a verdict: the first to ask reads what all have posted, names the
ranks that are behind or silent, and posts that as the reason.
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
_ASK_S = 10.0  # for the answer of a store that may be gone
_READS_APART_S = 2.5 * POST_S  # so that every rank that lives posts in between
_GRACE_S = 3.0  # for this rank to end by itself, once the job has failed elsewhere
_LINGER_S = 3.0  # at most, until all have read why
_GONE_AFTER = 5  # posts in a row that failed
_POSTS_PER_READ = 5  # of rank 0, between two reads of the status of all ranks
# A rank without a new post for so long counts as gone. Not sooner: a call that holds the
# interpreter, such as loading a library over a slow network, silences a live process.
_SILENT_S = 60.0
_BY_HAND = 130  # exit code, as in a shell
_LAST = 0  # number of the post with which a rank leaves in good order
# From the moment a rank has made no progress for too long until the last rank has ended.
_LONGEST_END_S = 7 * _ASK_S + _READS_APART_S + _GRACE_S + _LINGER_S
_numbers = itertools.count()  # of watchdogs of this process; equal on all ranks
_ALIVE, _ENDED, _ASKED, _READ = "alive/", "ended", "asked for a verdict", "read the end"

T = TypeVar("T")
_Statuses = Sequence["RankStatus | None"]  # of all ranks


@dataclass(frozen=True)
class RankStatus:
    """What a rank last posted.

    Attributes:
        progress: number of its calls of `Watchdog.progress`; grows together on all ranks.
        doing: what the rank does, in words.
        posts: number of its posts; grows while the process lives, 0 once it has left.
    """

    progress: int
    doing: str
    posts: int


@dataclass(frozen=True)
class _End:
    """Why the job ends, the same for all ranks: a sentence, and the exit code."""

    text: str
    code: int


class Watchdog:
    """Watches the work of this process and the status of the others, from threads."""

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
            timeout_s: without `progress` or `heartbeat` for so long, the process ends.
            hosts: of all ranks, to name them.
            launched: whether a launcher is the parent; if it dies, nobody else ends this process.
            ask_to_stop: called with the reason when the launcher is gone, so that the run saves
                and ends; if it does not, the process ends half a minute later.
        """
        self._timeout_s, self._hosts, self._ask_to_stop = timeout_s, hosts, ask_to_stop
        self._rank, self._store = distributed.rank(), distributed.KeyValueStore()
        self._own = ranks_text([self._rank], hosts)
        self._progress, self._doing, self._since = 0, "starting", time.monotonic()
        self._stop, self._leaving, self._lock = threading.Event(), False, threading.Lock()
        self._end: _End | None = None
        self._number = next(_numbers)
        self._ancestors = _ancestors() if launched else []
        self._poster = threading.Thread(target=self._post, name="heartbeat", daemon=True)
        self._poster.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def progress(self, doing: str) -> None:
        """Report that training has moved on, and what it does next, equally often on all ranks."""
        self._progress, self._doing, self._since = self._progress + 1, doing, time.monotonic()

    def heartbeat(self) -> None:
        """Report that the current work goes on; ranks may call it a different number of times."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def sharing_failure(self) -> Iterator[None]:
        """Tell the other ranks within seconds why the body of the `with` statement fails.

        Raises:
            RunFailedError: contact was lost; the text says which rank is gone, or why it ended.
            Exception: what the body raised.
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
        except PreemptedError:  # all ranks end with it, together
            self._leave()
            raise
        except BaseException as error:
            self._leaving = True
            self._settle(_ended(self._own, error))
            self._linger()
            raise
        else:
            self._leave()
        finally:
            self._stop.set()

    def _leave(self) -> None:
        """Post that no more posts will come: slower ranks must not take this one for dead."""
        self._stop.set()
        self._poster.join(_ASK_S)  # its last post would undo this one
        _bounded(lambda: self._post_status(_LAST), default=None)

    def _key(self, name: str) -> str:
        return f"job/{self._number}/{name}"

    def _post(self) -> None:
        """Post the status of this rank, and read whether the job has ended."""
        posts, failures = 0, 0
        others = _Silence(len(self._hosts)) if self._rank == 0 and len(self._hosts) > 1 else None
        while not self._stop.is_set():
            posts += 1
            try:
                self._post_status(posts)
                self._read_end()
                if others is not None and posts % _POSTS_PER_READ == 0 and self._end is None:
                    self._end_if_silent(others.update(self._read_statuses()))
                failures = 0
            except LostPeerError:
                failures += 1
                if failures == _GONE_AFTER and self._end is None:
                    nothing: _Statuses = [None for _ in self._hosts]
                    text = explain_missing(nothing, nothing, self._hosts)
                    self._end = _End(text, RunFailedError.exit_code)
            self._stop.wait(POST_S)

    def _post_status(self, posts: int) -> None:
        text = json.dumps([self._progress, self._doing, posts])
        self._store.set(self._key(f"{_ALIVE}{self._rank}"), text)

    def _end_if_silent(self, silent: Mapping[int, str]) -> None:
        """Rank 0: end the job if ranks died unnoticed, for example during a collective of NCCL."""
        if silent and not self._leaving:
            text = "; ".join(_phrases(silent, self._hosts, "is gone", "are gone"))
            said = f"{text}: no heartbeat for {_SILENT_S:.0f} s"
            self._settle(_End(said, RunFailedError.exit_code))

    def _read_end(self) -> bool:
        """Read why the job ends, if it does; true, as the store has answered."""
        text = self._store.get(self._key(_ENDED)) if self._end is None else None
        if text is not None:
            self._note_end(_End(*json.loads(text)))
        return True

    def _note_end(self, end: _End) -> None:
        """Note why the job ends, once, and tell rank 0 that it need not wait for this rank."""
        with self._lock:
            known, self._end = self._end is not None, self._end or end
        if not known:
            self._store.add(self._key(_READ))

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
                    f"{self._own} has made no progress for {idle_s:.0f} s"
                    f" (train.hang_timeout_s={self._timeout_s:g}), {self._doing}"
                )
                end = self._verdict(explain_hang)
                self._exit(f"{said}; {end.text}")

    def _verdict(self, explain: Callable[[_Statuses, _Statuses, Sequence[str]], str]) -> _End:
        """Why the job ends: what a failed rank has posted, or what the first to ask finds out.

        One rank reads the status of all: the store could not answer a thousand at once in time.
        """
        nothing: _Statuses = [None for _ in self._hosts]
        if not _bounded(self._read_end, default=False):
            return _End(explain(nothing, nothing, self._hosts), RunFailedError.exit_code)
        asked = _bounded(lambda: self._store.add(self._key(_ASKED)), default=1)
        deadline = time.monotonic() + 3 * _ASK_S + _READS_APART_S
        while asked > 1 and self._end is None and time.monotonic() < deadline:
            time.sleep(POST_S / 5)  # the other thread reads the end
        if self._end is None:
            before = self._statuses()
            time.sleep(_READS_APART_S)
            text = explain(before, self._statuses(), self._hosts)
            self._settle(_End(text, RunFailedError.exit_code))
        assert self._end is not None
        return self._end

    def _settle(self, end: _End) -> None:
        """Post why the job ends; if another rank was first, its reason counts."""

        def post() -> _End:
            text = json.dumps([end.text, end.code])
            return _End(*json.loads(self._store.set_default(self._key(_ENDED), text)))

        agreed = _bounded(post, default=end)
        _bounded(lambda: self._note_end(agreed), default=None)

    def _statuses(self) -> list[RankStatus | None]:
        """What every rank last posted; all None if the store does not answer."""
        nothing: list[RankStatus | None] = [None for _ in self._hosts]
        return _bounded(self._read_statuses, default=nothing)

    def _read_statuses(self) -> list[RankStatus | None]:
        keys = [self._key(f"{_ALIVE}{rank}") for rank in range(len(self._hosts))]
        texts = self._store.get_all(keys)
        return [None if text is None else RankStatus(*json.loads(text)) for text in texts]

    def _exit(self, text: str) -> None:
        try:
            logs.log_exit(f"error: {text}")
            self._linger()
        finally:
            os._exit(RunFailedError.exit_code if self._end is None else self._end.code)

    def _linger(self) -> None:
        """Keep rank 0 a little longer: the store ends with it, and others must still read."""
        if self._rank != 0 or len(self._hosts) == 1:
            return
        deadline = time.monotonic() + _LINGER_S
        while time.monotonic() < deadline:
            count = _bounded(lambda: self._store.add(self._key(_READ), 0), default=0)
            if count >= len(self._hosts):
                return
            time.sleep(POST_S / 10)


class _Silence:
    """Number of reads in a row without a new post, of each rank.

    Reads are counted, not seconds: a rank that was suspended with the whole job and wakes first
    must not take the others for dead.
    """

    def __init__(self, num_ranks: int) -> None:
        self._posts: list[int | None] = [None] * num_ranks
        self._num_silent = [0] * num_ranks

    def update(self, statuses: _Statuses) -> dict[int, str]:
        """Compare with the last read; the ranks silent for too long, and what they were doing."""
        silent = {}
        for rank, status in enumerate(statuses):
            posts = None if status is None else status.posts
            new = posts != self._posts[rank] or posts == _LAST
            self._posts[rank] = posts
            self._num_silent[rank] = 0 if new else self._num_silent[rank] + 1
            if self._num_silent[rank] * _POSTS_PER_READ * POST_S >= _SILENT_S:
                silent[rank] = "starting" if status is None else status.doing
        return silent


def _ended(own: str, error: BaseException) -> _End:
    """Why the job ends after an error of this rank, for the others."""
    if isinstance(error, KeyboardInterrupt):
        return _End(f"{own} was interrupted by hand", _BY_HAND)
    if isinstance(error, DinoscaleError):
        return _End(f"{own} ended: {error}", error.exit_code)
    return _End(f"{own} ended: {type(error).__name__}: {error}", RunFailedError.exit_code)


def collectives_timeout_s(hang_timeout_s: float) -> float:
    """Time-out of collectives: longer than a watchdog takes to end all ranks."""
    return hang_timeout_s + _LONGEST_END_S


def explain_missing(
    before: Sequence[RankStatus | None], after: Sequence[RankStatus | None], hosts: Sequence[str]
) -> str:
    """Which ranks stopped posting between two reads."""
    if all(status is None for status in after):
        return f"rank 0 ({hosts[0]}), where the ranks meet, is gone; its output says why"
    said = _phrases(_silent(before, after), hosts, "is gone", "are gone")
    return "; ".join(said) or "all ranks still answer: the network between them failed"


def explain_hang(
    before: Sequence[RankStatus | None], after: Sequence[RankStatus | None], hosts: Sequence[str]
) -> str:
    """Which ranks hold up the others: those that do not answer, else those that are behind."""
    known = [status for status in after if status is not None]
    if not known:
        return f"rank 0 ({hosts[0]}), where the ranks meet, does not answer"
    frozen = _phrases(_silent(before, after), hosts, "does not answer", "do not answer")
    least = min(status.progress for status in known)
    if frozen or least == max(status.progress for status in known):
        return "; ".join(frozen) or "all ranks answer and none is ahead of the others"
    behind = [
        f"{ranks_text([r], hosts)} is behind the others, {now.doing}"
        for r, now in enumerate(after)
        if now is not None and now.progress == least
    ]
    return "; ".join(behind)


def _phrases(doing: Mapping[int, str], hosts: Sequence[str], one: str, many: str) -> list[str]:
    """A phrase for the ranks that were doing the same, as those of a node that died."""
    of_doing: dict[str, list[int]] = {}
    for rank, what in doing.items():
        of_doing.setdefault(what, []).append(rank)
    return [
        f"{ranks_text(ranks, hosts)} {one if len(ranks) == 1 else many} (last seen {what})"
        for what, ranks in of_doing.items()
    ]


def _silent(
    before: Sequence[RankStatus | None], after: Sequence[RankStatus | None]
) -> dict[int, str]:
    """Ranks that posted nothing between two reads, and what they were doing."""
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
