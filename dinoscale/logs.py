"""What a run says: rank 0 on the terminal, and each rank in a file of its own in the run directory.

The files tell afterwards what happened on a node whose output the launcher dropped.
"""

import logging
import sys
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)


def to_terminal(rank: int) -> None:
    """Begin to log: all of rank 0, and what is wrong on the others, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    form = f"%(levelname).1s %(asctime)s rank {rank}: %(message)s"
    handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def to_file(folder: Path, *, rank: int, header: str) -> str | None:
    """Log to `folder`/rank_00003.log as well, behind what is there, and no longer elsewhere.

    Args:
        folder: is made.
        rank: of this process.
        header: first line of this start.

    Returns:
        Why it cannot be written, or None.
    """
    forget_file()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _RankLog(folder / f"rank_{rank:05d}.log")
    except OSError as error:
        return error.strerror or str(error)
    logging.getLogger().addHandler(file)
    note(header)
    return None


def forget_file() -> None:
    """Log to no file from now on."""
    for file in _files():
        logging.getLogger().removeHandler(file)
        file.close()


def note(text: str) -> None:
    """Write to the file alone, for what is printed by itself."""
    for file in _files():
        file.handle(logging.makeLogRecord({"levelno": logging.INFO, "levelname": "-", "msg": text}))


def _files() -> list["_RankLog"]:
    return [file for file in logging.getLogger().handlers if isinstance(file, _RankLog)]


class _RankLog(logging.FileHandler):
    """A file that a full disk silences; the run goes on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s"))
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._failed:
            super().emit(record)

    def close(self) -> None:
        with suppress(OSError):  # of what could not be written
            super().close()

    def handleError(self, _record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        self._failed = True  # before the next line comes here, too
        log.warning("cannot write %s: %s; it ends here", self.baseFilename, sys.exc_info()[1])
