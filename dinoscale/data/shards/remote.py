"""Remote files: the output of a command that downloads a URL.

A URL reaches its command as one argument, never through a shell; curl reads it from standard input,
where `ps` does not show it. `${DINOSCALE_NAME}` in a URL is replaced by that environment variable
when the URL is opened, so that a configuration need not contain passwords. Other names are not
replaced: a configuration may come from a stranger, and could send any variable anywhere.
`pipe:COMMAND` is a shell command, and runs only with DINOSCALE_ALLOW_PIPE=1 in the environment.
Nothing here waits forever: a command that sends no byte for a minute is killed and has failed.
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

_IDLE_TIMEOUT_S = 60.0  # without a byte, after which a transfer counts as stuck
_EXIT_TIMEOUT_S = 10.0  # between the last byte of a command and its exit
_NO_COMMAND = (126, 127)  # exit codes of a shell whose command cannot be run
_SHOWN = 300  # characters of a command's error message

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # before each retry: four minutes in all

# What clients say of requests that a retry does not help. Of the 4xx responses, 408 (timeout), 425
# (too early) and 429 (too many requests) are not among them.
_REFUSED = re.compile(
    r"[:(] ?40[13]\b|access ?denied|forbidden|unauthorized|permission denied|invalidaccesskeyid"
    r"|signaturedoesnotmatch|expiredtoken|unable to locate credentials",
    re.IGNORECASE,
)
_ABSENT = re.compile(
    r"[:(] ?4(04|10)\b|nosuchkey|nosuchbucket|no urls matched|no such file or directory",
    re.IGNORECASE,
)
_PERMANENT = re.compile(r"returned error: 4(?!08|25|29)\d\d|curl: \([13]\)")  # curl 1, 3: no URL

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_OWN_VARIABLE = "DINOSCALE_"

_CURL = (
    *("curl", "--fail", "--silent", "--show-error", "--location", "--globoff"),
    *("--proto", "=http,https", "--connect-timeout", "30", "--netrc-optional"),
    *("--config", "-"),
)
# Scheme -> command; the URL replaces the empty argument, or goes to standard input.
_COMMANDS: dict[str, tuple[str, ...]] = {
    "http": _CURL,
    "https": _CURL,
    "s3": ("aws", "s3", "cp", "--only-show-errors", "", "-"),
    "gs": ("gsutil", "-q", "cat", ""),
    "hdfs": ("hdfs", "dfs", "-cat", ""),
}


class TransferError(Exception):
    """A failed transfer; a retry may succeed. The message is half a sentence."""


class DamagedError(TransferError):
    """The data is damaged though the client reported success: cut off on the way, or stored so."""


def is_remote(spec: str) -> bool:
    """Whether a spec names something that `open_remote` can read."""
    return scheme_of(spec) in (*_COMMANDS, "pipe")


def scheme_of(spec: str) -> str:
    """`https` of `https://host/a.tar`, lower-case; empty without a colon."""
    scheme, colon, _ = spec.partition(":")
    return scheme.lower() if colon else ""


def shown(url: str) -> str:
    """The URL or path for messages: without password and signature."""
    if "://" not in url or scheme_of(url) == "pipe":
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # e.g. an unmatched bracket
        return url.rpartition("@")[2].partition("?")[0]
    try:
        _ = urlsplit(_VARIABLE.sub("1", url)).port
    except ValueError:  # maybe the start of a password with a /, ? or # in it
        parts = urlsplit(f"{parts.scheme}://{url.rpartition('@')[2].rpartition('://')[2]}")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def require_allowed(url: str) -> None:
    """Refuse an invalid URL, and a shell command that the environment does not allow.

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


def open_remote(url: str, *, idle_timeout_s: float = _IDLE_TIMEOUT_S) -> "RemoteFile":
    """Start to download a URL.

    Args:
        url: URL with one of the schemes above.
        idle_timeout_s: seconds without a byte after which reading fails.

    Raises:
        DataError: the command is not installed, or not allowed.
    """
    require_allowed(url)
    command, stdin_data = _command(url)
    stderr = tempfile.TemporaryFile()  # noqa: SIM115 # closed with the stream
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if stdin_data else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,  # signals to the whole job do not reach it
        )
    except (OSError, ValueError) as error:
        stderr.close()
        raise DataError(
            f"{shown(url)}: cannot run `{command[0]}` ({error}). Install it on every node, or copy "
            "the shards to a local or mounted disk."
        ) from None
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # its exit code says why
            process.stdin.write(stdin_data)
    return RemoteFile(url, command[0], process, stderr, idle_timeout_s=idle_timeout_s)


def _command(url: str) -> tuple[list[str], bytes]:
    """The command, and its standard input."""
    if scheme_of(url) == "pipe":
        return ["sh", "-c", url.partition(":")[2]], b""
    filled = _filled(url)
    command = _COMMANDS[scheme_of(url)]
    if "" not in command:
        quoted = filled.replace("\\", "\\\\").replace('"', '\\"')
        return [*command], os.fsencode(f'url = "{quoted}"\n')
    return [word or filled for word in command], b""


def _filled(url: str) -> str:
    """The URL with its variables replaced by their values.

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
        raise DataError(f"{shown(url)!r} cannot be read: it contains a control character.")
    return filled


class RemoteFile(io.RawIOBase):
    """The output of a command, as a raw stream; made by `open_remote`.

    Reading raises TransferError when the command fails, stops sending, or ends with an error after
    its last byte; DataError when a retry would not help.
    """

    def __init__(
        self,
        url: str,
        name: str,
        process: "subprocess.Popen[bytes]",
        stderr: IO[bytes],
        *,
        idle_timeout_s: float,
    ):
        super().__init__()
        self._url, self._name, self._idle_timeout_s = url, name, idle_timeout_s
        self._process, self._stderr = process, stderr

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Read bytes as they come; 0 after the last byte of a command that succeeded."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(self._idle_timeout_s * 1000):
            raise TransferError(f"{self._name} sent nothing for {self._idle_timeout_s:g} s")
        with memoryview(buffer) as view:
            count = os.readv(descriptor, [view])
        if count == 0:
            self._require_success()
        return count

    def _require_success(self) -> None:
        try:
            code = self._process.wait(timeout=_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise TransferError(f"{self._name} did not exit after its last byte") from None
        if code:
            self._stderr.seek(0)
            words = self._stderr.read(_SHOWN).decode("utf-8", "replace").split()
            message = " ".join(words) or "no message"
            text = f"{self._name} ended with exit code {code}: {message}"
            if remedy := _remedy(message, code):
                raise DataError(f"{shown(self._url)} cannot be read: {text}. {remedy}")
            raise TransferError(text)

    def close(self) -> None:
        """Kill the command, with all that it started."""
        if not self.closed:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._stderr.close()
        super().close()


def _remedy(message: str, code: int) -> str:
    """What to do about an error that a retry does not help; empty if it may."""
    if code in _NO_COMMAND:
        return "Install the command on every node, or correct its name."
    if _REFUSED.search(message):
        return (
            "The server refuses access: correct user, password or signature, which may have"
            " expired. Some servers also answer so for names that do not exist."
        )
    return "Correct its name." if _ABSENT.search(message) or _PERMANENT.search(message) else ""


def read_all(url: str, *, limit: int, pauses_s: tuple[float, ...]) -> bytes:
    """All bytes of a URL.

    Args:
        url: as for `open_remote`.
        limit: most bytes.
        pauses_s: seconds before each retry.

    Raises:
        DataError: it cannot be read, or is longer.
        UnavailableError: the network or server failed at every try.
    """
    data = retried(lambda: _read_once(url, limit=limit), name=shown(url), pauses_s=pauses_s)
    if len(data) > limit:
        raise DataError(f"{shown(url)} is longer than {limit} bytes.")
    return data


def _read_once(url: str, *, limit: int) -> bytes:
    with io.BufferedReader(open_remote(url)) as file:
        return file.read(limit + 1)


def retried(read: Callable[[], T], *, name: str, pauses_s: Sequence[float]) -> T:
    """Read, and retry failed transfers after a pause.

    Args:
        read: raises TransferError.
        name: what is read, for messages.
        pauses_s: seconds before each retry.

    Raises:
        DataError: the data is damaged at the last try, too.
        UnavailableError: the last try failed, too.
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
            f"{name} cannot be read: {error}. Correct its name, the connection or the file."
        ) from None
    except TransferError as error:
        raise UnavailableError(
            f"{name} cannot be read: {error}; tried {len(pauses_s) + 1} times in"
            f" {sum(pauses_s):.0f} s. Once the server and the network work, start again."
        ) from None
