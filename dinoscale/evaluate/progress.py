"""Progress of a measurement: a bar on a terminal, else a line a minute in the log."""

import logging
import sys
from typing import Any

log = logging.getLogger(__name__)

LINE_S = 60.0  # between two lines


def bar_options(*, shown: bool) -> dict[str, Any]:
    """The options of `tqdm` that make a bar of it, or lines, or nothing."""
    if not shown or sys.stderr.isatty():
        return {"disable": not shown}
    lines = {"mininterval": LINE_S, "delay": LINE_S, "miniters": 1}
    return {**lines, "file": _Log(), "ncols": 0, "leave": False}


class _Log:
    """A text stream into the log."""

    def write(self, text: str) -> None:
        if line := text.strip():
            log.info("%s", line)

    def flush(self) -> None:
        """Nothing is held back."""
