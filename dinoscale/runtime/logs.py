"""Logs of a run: rank 0 on the terminal, and each rank in its own file in the run directory.

The files show afterwards what happened on a node whose output the launcher dropped. The terminal,
or the file or pipe in its place, may be closed, full or stopped: that loses output, never a run.
"""

import logging
import os
import select
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

log = logging.getLogger(__name__)

_BLOCKED_S = 1.0  # how long a stopped terminal may hold up a line on stderr
_PIECE = 1000  # characters; a pipe that is writable takes 4096 bytes
_LOG_EXIT_S = 3.0  # to write to stderr, and again to the file


def shield_terminal() -> None:
    """Make stdout and stderr drop what they cannot write, for the whole process.

    Closed descriptors are opened on the null device: otherwise the next file would get their
    numbers, and with them what libraries print.
    """
    for number, mode in ((0, "r"), (1, "w"), (2, "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        name = ("stdin", "stdout", "stderr")[number]
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # until the process ends
    sys.stdout = cast(TextIO, _Lossy(sys.stdout, waits=True))  # results must not be dropped
    sys.stderr = cast(TextIO, _Lossy(sys.stderr, waits=False))


def stdout_error() -> Exception | None:
    """The first error of stdout since `shield_terminal`, apart from a reader that closed it."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    error = sys.stdout.error if isinstance(sys.stdout, _Lossy) else None
    return None if isinstance(error, BrokenPipeError) else error


class _Lossy:
    """A text stream whose writes never fail and, unless it `waits`, never hang.

    Attributes:
        error: the first error; None while all went well.
    """

    def __init__(self, stream: TextIO, *, waits: bool) -> None:
        self._stream, self._waits = stream, waits
        self._was_writable = True
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        try:
            if self._waits:
                self._stream.write(text)
            else:
                self._write_what_fits(text)
        except (OSError, ValueError) as error:  # closed by us; a character it cannot encode
            self.error = self.error or error
        return len(text)

    def _write_what_fits(self, text: str) -> None:
        for start in range(0, len(text), _PIECE):
            if not self._is_writable():
                return
            self._stream.write(text[start : start + _PIECE])
            self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._waits or self._is_writable():
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _is_writable(self) -> bool:
        """Whether a line can be written now: not to a terminal after Ctrl-S or to a full pipe."""
        wait_s = _BLOCKED_S if self._was_writable else 0.0
        try:
            poll = select.poll()
            poll.register(self._stream.fileno(), select.POLLOUT)
            self._was_writable = bool(poll.poll(1000 * wait_s))
        except (OSError, ValueError):  # no file of the operating system, as in a test
            self._was_writable = True
        return self._was_writable


def to_terminal(rank: int) -> None:
    """Log to stderr: everything of rank 0, warnings and errors of the others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    form = f"%(levelname).1s %(asctime)s rank {rank}: %(message)s"
    handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def to_file(folder: Path, *, rank: int, header: str) -> str | None:
    """Append the log to `folder`/rank_00003.log as well, and to no other file.

    Args:
        folder: created if missing.
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
    """Write to the file only, for what is also printed."""
    for file in _files():
        file.handle(logging.makeLogRecord({"levelno": logging.INFO, "levelname": "-", "msg": text}))


def log_exit(text: str) -> None:
    """Say why this process ends, on stderr and in the file; neither can hold it up.

    A file system that no longer answers may be why the job hangs, and would block the logging
    thread too: so other threads write, and are left behind.
    """

    def on_stderr() -> None:
        with suppress(OSError, ValueError):  # nobody reads it; the process ends anyway
            print(text, file=sys.stderr, flush=True)

    def in_file() -> None:
        note(text)

    for say in (on_stderr, in_file):
        thread = threading.Thread(target=say, daemon=True)
        with suppress(RuntimeError):  # no thread can be started any more
            thread.start()
            thread.join(_LOG_EXIT_S)


def _files() -> list["_RankLog"]:
    return [file for file in logging.getLogger().handlers if isinstance(file, _RankLog)]


class _RankLog(logging.FileHandler):
    """A log file that ends when the disk is full; the run goes on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s"))
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._failed:
            super().emit(record)

    def close(self) -> None:
        with suppress(OSError):  # what is buffered cannot be written
            super().close()

    def handleError(self, _record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        self._failed = True  # first, as the warning below comes here too
        log.warning("cannot write %s: %s; it ends here", self.baseFilename, sys.exc_info()[1])


def not_compiled(what: str, error: Exception) -> str:
    """The warning that compilation failed; `what` names, in the plural, what runs uncompiled."""
    # The first line may only name the compiler, and the second one the reason.
    reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
    return (
        f"{what} are not compiled, which costs time only: {reason}; engine.compile=false silences"
        " this"
    )
