"""Requests to stop: by launchers and schedulers (SIGTERM, SIGUSR1), by hand (Ctrl-C, SIGHUP)."""

import contextlib
import os
import select
import signal
import time
from types import FrameType

from dinoscale.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_OF_TERMINALS = (signal.SIGINT, signal.SIGHUP)
_AGAIN_S = 3.0  # launchers repeat a Ctrl-C for ranks that have had it; a later one is a second
_HANDED_ON = "DINOSCALE_STOP_REASON"  # variable of a process that has been started anew
_HEARD = b"\nstopping after this step, which is saved; Ctrl-C again ends at once, unsaved\n"


def stop_signals() -> list[signal.Signals]:
    """The signals that ask this process to stop, those of its terminal unless it ignores them."""
    ignored = signal.SIG_IGN  # as by nohup, and in the background
    return [*SIGNALS, *(n for n in _OF_TERMINALS if signal.getsignal(n) is not ignored)]


def handed_on() -> dict[str, str]:
    """Variables with a request to stop that this process has had, for the one in its place."""
    return {_HANDED_ON: StopRequest.latest} if StopRequest.latest else {}


class StopRequest:
    """Records a request to stop; the run checks it in each step.

    Attributes:
        latest: reason of the last request to this process; None while there is none.
        reason: of the first request to this object.
    """

    latest: str | None = None

    def __init__(self, *, answer: bool) -> None:
        """Install the signal handlers; only the main thread may.

        Args:
            answer: acknowledge a Ctrl-C on stderr.
        """
        self.reason: str | None = os.environ.pop(_HANDED_ON, None)
        self._answer = answer
        self._by_hand_at: float | None = None  # of the first Ctrl-C
        for number in stop_signals():
            signal.signal(number, self._remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # `restart` held them back

    @property
    def asked(self) -> bool:
        """Whether the run should end."""
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Ask for the run to end; the first reason counts."""
        self.reason = self.reason or reason
        StopRequest.latest = self.reason

    def check(self) -> None:
        """End long work if this rank was asked to stop.

        Raises:
            PreemptedError: it was; the others must be told.
        """
        if self.asked:
            raise PreemptedError(f"asked to stop ({self.reason}); the same command goes on")

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self.ask(signal.Signals(number).name)
            return
        now = time.monotonic()
        if self._by_hand_at is None:
            self._by_hand_at = now
            if self._answer:
                _say(_HEARD)
        elif now - self._by_hand_at > _AGAIN_S:
            raise KeyboardInterrupt
        self.ask("Ctrl-C")


def _say(text: bytes) -> None:
    """Write to stderr if it is writable; a stopped terminal would hold up the run."""
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if poll.poll(0):
            os.write(2, text)
