"""Being asked to stop: SIGTERM (launchers, schedulers), SIGUSR1 (SLURM's warning), an orphan."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that somebody asked; the run looks at it in each step."""

    def __init__(self) -> None:
        """Install the handlers; only the main thread may."""
        self.reason: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Ask for the run to end; the first reason counts."""
        self.reason = self.reason or reason

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
