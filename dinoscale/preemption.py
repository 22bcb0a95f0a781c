"""Being asked to stop: SIGTERM (launchers, schedulers) and SIGUSR1 (SLURM's warning)."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal; the run looks at it at the end of each step."""

    def __init__(self) -> None:
        """Install the handlers; only the main thread may."""
        self.signal_name: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.signal_name is not None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
