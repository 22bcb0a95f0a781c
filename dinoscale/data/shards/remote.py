"""Bytes from elsewhere: the output of a command that fetches what a URL names.

A URL reaches its command as one argument, never through a shell; curl reads it from its standard
input, where `ps` shows nothing. `${DINOSCALE_NAME}` in a URL is replaced by that variable of the
environment when it is opened, so that no password has to stand in a configuration. Only names that
begin so: a configuration may come from a stranger, and could send any other variable anywhere.
`pipe:COMMAND` is a shell command by nature: it runs only where the environment says
DINOSCALE_ALLOW_PIPE=1. Nothing here waits without end: a command that sends no byte for a minute
is ended and counts as failed.
"""

import contextlib
import io
import logging
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from dinoscale.errors import DataError, UnavailableError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = logging.getLogger(__name__)

T = TypeVar("T")

ALLOW_PIPE = "DINOSCALE_ALLOW_PIPE"

_SILENCE_S = 60.0  # without a byte, after which a transfer counts as stuck
_END_S = 10.0  # between the last byte of a command and its end
_NO_COMMAND = (126, 127)  # exit codes of a shell whose command cannot be run
_SHOWN = 300  # characters of a command's complaint

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # before each further try: four minutes

# What clients say of a request that will fail again, and what is to be mended then. Of the answers
# 4xx those are none: 408 (time-out), 425 (too early), 429 (too many requests).
_REFUSED = re.compile(
    r"[:(] ?40[13]\b|access ?denied|forbidden|unauthorized|permission denied|invalidaccesskeyid"
    r"|signaturedoesnotmatch|expiredtoken|unable to locate credentials",
    re.IGNORECASE,
)
_ABSENT = re.compile(
    r"[:(] ?4(04|10)\b|nosuchkey|nosuchbucket|no urls matched|no such file or directory",
    re.IGNORECASE,
)
_IN_VAIN = re.compile(r"returned error: 4(?!08|25|29)\d\d|curl: \([13]\)")  # or no URL

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_OWN_VARIABLE = "DINOSCALE_"

_CURL = (
    *("curl", "--fail", "--silent", "--show-error", "--location", "--globoff"),
    *("--proto", "=http,https", "--connect-timeout", "30", "--netrc-optional"),
    *("--config", "-"),
)
# Scheme -> command; the URL takes the place of the empty word, or comes by standard input.
_COMMANDS: dict[str, tuple[str, ...]] = {
    "http": _CURL,
    "https": _CURL,
    "s3": ("aws", "s3", "cp", "--only-show-errors", "", "-"),
    "gs": ("gsutil", "-q", "cat", ""),
    "hdfs": ("hdfs", "dfs", "-cat", ""),
}


class TransferError(Exception):
    """A transfer that failed; the next try may succeed. The message is half a sentence."""


class DamagedError(TransferError):
    """What came is not whole, though the client says so: it was cut off, or it lies so."""


def is_remote(spec: str) -> bool:
    """Whether a spec names something that `open_remote` can read."""
    return scheme_of(spec) in (*_COMMANDS, "pipe")


def scheme_of(spec: str) -> str:
    """`https` of `https://host/a.tar`, lower-case; empty without a colon."""
    scheme, colon, _ = spec.partition(":")
    return scheme.lower() if colon else ""


def shown(url: str) -> str:
    """The URL or path for messages: without a password or a signature in it."""
    if "://" not in url or scheme_of(url) == "pipe":
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # of a bracket, say
        return url.rpartition("@")[2].partition("?")[0]
    try:
        _ = urlsplit(_VARIABLE.sub("1", url)).port
    except ValueError:  # maybe the start of a password with a /, ? or # in it
        parts = urlsplit(f"{parts.scheme}://{url.rpartition('@')[2].rpartition('://')[2]}")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def require_allowed(url: str) -> None:
    """Refuse what is no URL, and a shell command where the environment does not allow it.

    Raises:
        DataError: it is refused.
    """
    try:
        urlsplit(url)
    except ValueError:  # whose text may hold the password
        raise DataError(f"{shown(url)} is not a URL.") from None
    if scheme_of(url) == "pipe" and os.environ.get(ALLOW_PIPE) != "1":
        raise DataError(
            f"{url}: this is a shell command, and a configuration may come from a stranger. If you "
            f"know what it does, set {ALLOW_PIPE}=1 in the environment of all ranks."
        )


def open_remote(url: str, *, silence_s: float = _SILENCE_S) -> "RemoteFile":
    """Begin to fetch what a URL names.

    Args:
        url: with one of the schemes above.
        silence_s: seconds without a byte after which reading fails.

    Raises:
        DataError: the command is not installed, or not allowed.
    """
    require_allowed(url)
    command, told = _command(url)
    complaints = tempfile.TemporaryFile()  # noqa: SIM115 # closed with the stream
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if told else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,  # a signal to the whole job is not meant for it
        )
    except (OSError, ValueError) as error:
        complaints.close()
        raise DataError(
            f"{shown(url)}: cannot run `{command[0]}` ({error}). Install it on every node, or copy "
            "the shards to a local or mounted disk."
        ) from None
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # its exit code says why
            process.stdin.write(told)
    return RemoteFile(url, command[0], process, complaints, silence_s=silence_s)


def _command(url: str) -> tuple[list[str], bytes]:
    """What to run, and what it reads."""
    if scheme_of(url) == "pipe":
        return ["sh", "-c", url.partition(":")[2]], b""
    filled = _filled(url)
    command = _COMMANDS[scheme_of(url)]
    if "" not in command:
        quoted = filled.replace("\\", "\\\\").replace('"', '\\"')
        return [*command], os.fsencode(f'url = "{quoted}"\n')
    return [word or filled for word in command], b""


def _filled(url: str) -> str:
    """The URL with the values of the variables that it names.

    Raises:
        DataError: one is not set, or is not for URLs; or the URL has more than one line.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not name.startswith(_OWN_VARIABLE):
            raise DataError(
                f"{shown(url)}: ${{{name}}} is not replaced, since a configuration may come from a "
                f"stranger and send it anywhere; export {_OWN_VARIABLE}{name} and write that."
            )
        if name not in os.environ:
            raise DataError(
                f"{shown(url)}: ${{{name}}} is not set; export {name} in the environment of all "
                "ranks."
            )
        return os.environ[name]

    filled = _VARIABLE.sub(value, url)
    if any(character < " " for character in filled):
        raise DataError(f"{shown(url)!r} cannot be read: it holds a line break or the like.")
    return filled


class RemoteFile(io.RawIOBase):
    """The output of a command, as a raw stream; made by `open_remote`.

    Reading raises TransferError when the command fails, stops sending, or ends with an error after
    its last byte; DataError when another try would be in vain.
    """

    def __init__(
        self,
        url: str,
        name: str,
        process: "subprocess.Popen[bytes]",
        complaints: IO[bytes],
        *,
        silence_s: float,
    ):
        super().__init__()
        self._url, self._name, self._silence_s = url, name, silence_s
        self._process, self._complaints = process, complaints

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Bytes as they come; 0 after the last one of a command that ended well."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(self._silence_s * 1000):
            raise TransferError(f"{self._name} sent nothing for {self._silence_s:g} s")
        with memoryview(buffer) as view:
            count = os.readv(descriptor, [view])
        if count == 0:
            self._require_success()
        return count

    def _require_success(self) -> None:
        try:
            code = self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            raise TransferError(f"{self._name} did not end after its last byte") from None
        if code:
            self._complaints.seek(0)
            words = self._complaints.read(_SHOWN).decode("utf-8", "replace").split()
            said = " ".join(words) or "no message"
            text = f"{self._name} ended with exit code {code}: {said}"
            if remedy := _remedy(said, code):
                raise DataError(f"{shown(self._url)} cannot be read: {text}. {remedy}")
            raise TransferError(text)

    def close(self) -> None:
        """End the command, with all that it started."""
        if not self.closed:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._complaints.close()
        super().close()


def _remedy(said: str, code: int) -> str:
    """What helps where another try would be in vain; empty where it may succeed."""
    if code in _NO_COMMAND:
        return "Install the command on every node, or correct its name."
    if _REFUSED.search(said):
        return (
            "The server refuses access: correct user, password or signature, which may have"
            " expired. Some servers say so of names that do not exist, too."
        )
    return "Correct its name." if _ABSENT.search(said) or _IN_VAIN.search(said) else ""


def read_all(url: str, *, limit: int, pauses_s: tuple[float, ...]) -> bytes:
    """All bytes of a URL.

    Args:
        url: as `open_remote`.
        limit: most bytes.
        pauses_s: seconds to wait before each further try.

    Raises:
        DataError: it cannot be read, or is longer.
        UnavailableError: the network or server failed to the last try.
    """
    data = retried(lambda: _read_once(url, limit=limit), name=shown(url), pauses_s=pauses_s)
    if len(data) > limit:
        raise DataError(f"{shown(url)} is longer than {limit} bytes.")
    return data


def _read_once(url: str, *, limit: int) -> bytes:
    with io.BufferedReader(open_remote(url)) as file:
        return file.read(limit + 1)


def retried(read: Callable[[], T], *, name: str, pauses_s: Sequence[float]) -> T:
    """Read, and on a failed transfer wait and read again.

    Args:
        read: raises TransferError.
        name: of what is read, for messages.
        pauses_s: seconds before each further try.

    Raises:
        DataError: what came is damaged, at the last try too.
        UnavailableError: the last try failed too.
    """
    for pause in pauses_s:
        try:
            return read()
        except TransferError as error:  # noqa: PERF203 # a transfer costs more than a try
            log.warning("%s cannot be read: %s; trying again in %g s", name, error, pause)
            time.sleep(pause)
    try:
        return read()
    except DamagedError as error:
        raise DataError(
            f"{name} cannot be read: {error}. Correct its name, or mend the connection or the file."
        ) from None
    except TransferError as error:
        raise UnavailableError(
            f"{name} cannot be read: {error}; it was tried {len(pauses_s) + 1} times in"
            f" {sum(pauses_s):.0f} s. Once the server and the network are well, start again."
        ) from None
