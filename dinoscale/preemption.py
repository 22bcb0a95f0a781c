"""Being asked to stop: by launchers and schedulers (SIGTERM, SIGUSR1), by hand (Ctrl-C, SIGHUP)."""

import contextlib
import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_OF_TERMINALS = (signal.SIGINT, signal.SIGHUP)
_AGAIN_S = 3.0  # launchers pass a Ctrl-C on to ranks that have had it; later it is meant
_HEARD = b"\nstopping after this step, which is saved; Ctrl-C again ends at once, unsaved\n"


class StopRequest:
    """Remembers that somebody asked; the run looks at it in each step."""

    def __init__(self, *, answer: bool) -> None:
        """Install the handlers; only the main thread may.

        Args:
            answer: say on stderr that a Ctrl-C was heard.
        """
        self.reason: str | None = None
        self._answer = answer
        self._at = 0.0
        for number in SIGNALS:
            signal.signal(number, self._remember)
        for number in _OF_TERMINALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup, and in the background
                signal.signal(number, self._remember)

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Ask for the run to end; the first reason counts."""
        self.reason = self.reason or reason

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        first, now = not self.asked, time.monotonic()
        if number == signal.SIGINT:
            if not first and now - self._at > _AGAIN_S:
                raise KeyboardInterrupt
            if first and self._answer:
                with contextlib.suppress(OSError):
                    os.write(2, _HEARD)
        if first:
            self._at = now
        self.ask("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
