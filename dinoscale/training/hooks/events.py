"""Events of a run, one line each in events.jsonl, which continues across resumes."""

import contextlib
import json
import logging
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Events:
    """Rank 0's record of resumes, failed saves, skipped steps, collapses and stops."""

    def __init__(self, run_dir: Path, *, active: bool) -> None:
        """`active` on rank 0; on other ranks nothing is written."""
        self._path = run_dir / "events.jsonl" if active else None

    def write(self, step: int, event: str, **values: Any) -> None:
        """Append {"time", "step", "event", ...}; a full disk does not end the run."""
        if self._path is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps({"time": now, "step": step, "event": event, **values})
        try:
            with self._path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            log.warning("cannot write %s: %s (%s)", self._path, error, line)


def count_events(run_dir: Path) -> dict[str, int]:
    """Count of each event in a run's events.jsonl; empty if there are none."""
    path = run_dir / "events.jsonl"
    found: Counter[str] = Counter()
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError):  # a line cut off by a crash
            found[json.loads(line)["event"]] += 1
    return dict(found)
