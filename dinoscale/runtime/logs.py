"""What a run says: rank 0 on the terminal, and each rank in a file of its own in the run directory.

The files tell afterwards what happened on a node whose output the launcher dropped. The terminal,
or what stands in for it, may be closed, full or stopped: that loses words, never a run.
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

_ROOM_S = 1.0  # that a stopped terminal may hold up a line on stderr
_PIECE = 1000  # characters; a pipe that has room at all takes 4096 bytes
_LAST_WORDS_S = 3.0  # for each of the places where they are written


def shield_terminal() -> None:
    """Make stdout and stderr take what they can and lose the rest, for the whole process.

    Descriptors that are closed are opened on the null device: else the next file would get their
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
    sys.stdout = cast(TextIO, _Lossy(sys.stdout, waits=True))  # a result is worth a wait
    sys.stderr = cast(TextIO, _Lossy(sys.stderr, waits=False))


def lost_output() -> Exception | None:
    """What went wrong with stdout since it was shielded, apart from a reader that had enough."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    error = sys.stdout.error if isinstance(sys.stdout, _Lossy) else None
    return None if isinstance(error, BrokenPipeError) else error


class _Lossy:
    """A text stream whose writes never fail and, unless it `waits`, never hang.

    Attributes:
        error: the first that was met; None while all went well.
    """

    def __init__(self, stream: TextIO, *, waits: bool) -> None:
        self._stream, self._waits = stream, waits
        self._had_room = True
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        try:
            if self._waits:
                self._stream.write(text)
            else:
                self._write_what_fits(text)
        except (OSError, ValueError) as error:  # closed in here; a letter that it cannot encode
            self.error = self.error or error
        return len(text)

    def _write_what_fits(self, text: str) -> None:
        for start in range(0, len(text), _PIECE):
            if not self._has_room():
                return
            self._stream.write(text[start : start + _PIECE])
            self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._waits or self._has_room():
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _has_room(self) -> bool:
        """Whether a line can be written now; a terminal on Ctrl-S and a pipe unread have none."""
        wait_s = _ROOM_S if self._had_room else 0.0
        try:
            poll = select.poll()
            poll.register(self._stream.fileno(), select.POLLOUT)
            self._had_room = bool(poll.poll(1000 * wait_s))
        except (OSError, ValueError):  # not a file of the system, as in a test
            self._had_room = True
        return self._had_room


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


def last_words(text: str) -> None:
    """Say why this process ends, on stderr and in the file; neither can keep it.

    A file system that no longer answers is why a job hangs, and holds up whoever writes a log; so
    another thread does, and is left behind.
    """

    def on_stderr() -> None:
        with suppress(OSError, ValueError):  # nobody reads it; the process ends still
            print(text, file=sys.stderr, flush=True)

    def in_file() -> None:
        note(text)

    for say in (on_stderr, in_file):
        thread = threading.Thread(target=say, daemon=True)
        with suppress(RuntimeError):  # no thread can be started any more
            thread.start()
            thread.join(_LAST_WORDS_S)


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


def not_compiled(what: str, error: Exception) -> str:
    """The warning that a compiler failed; `what` is the plural of what then runs as it is."""
    # The first line may only say which compiler raised what the second one says.
    reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
    return (
        f"{what} are not compiled, which costs time only: {reason}; engine.compile=false silences"
        " this"
    )
