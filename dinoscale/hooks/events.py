"""What happened to a run besides its numbers: events.jsonl, one JSON object a line."""

import json
from pathlib import Path


class Events:
    """Rank 0's list of events; on other ranks every method does nothing.

    Lines are only ever appended: a resumed run may meet an event again, and says so again.
    """

    def __init__(self, run_dir: Path, *, active: bool) -> None:
        self._path, self._active = run_dir / "events.jsonl", active

    def write(self, step: int, event: str, **values: str | float) -> None:
        """Append one line: `event` happened after `step` optimizer steps."""
        if not self._active:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "event": event, **values}) + "\n")
