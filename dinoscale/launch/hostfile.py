"""Who takes part: DeepSpeed's hostfile, and the variables that DeepSpeed hands to the nodes.

DeepSpeed reads both files loosely: text after `slots=8` is ignored, an empty line in
`.deepspeed_env` ends it with a stack. Here every line is checked, and refused by its number.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinoscale.errors import LaunchError

_MAX_SLOTS = 1024  # no node has more; DeepSpeed makes a list of that length
_MAX_BYTES = 10**6
_NAME = r"(?:\w[\w.-]*@)?\w[\w.-]*"  # no leading dash: ssh would take it for an option
_LINE = re.compile(rf"(?P<name>{_NAME})\s+slots=(?P<slots>\d{{1,9}})\s*(?:#.*)?", re.ASCII)
_VARIABLE = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A node: its name for ssh, perhaps `user@node`, and how many processes it runs.

    Attributes:
        name: as given.
        slots: processes, None: one for each GPU.
    """

    name: str
    slots: int | None

    @property
    def address(self) -> str:
        """The name without the user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: Path) -> list[Host]:
    """Read lines `node slots=8`; empty lines and `#` comments are skipped.

    Raises:
        LaunchError: the file cannot be read, or a line of it is wrong.
    """
    hosts: dict[str, tuple[int, Host]] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        match = _LINE.fullmatch(line)
        if not match:
            raise LaunchError(f"{where}: {line[:80]!r} is not like 'node1 slots=8'")
        slots = int(match["slots"])
        if not 1 <= slots <= _MAX_SLOTS:
            raise LaunchError(f"{where}: slots={slots} is not in 1..{_MAX_SLOTS}")
        host = Host(match["name"], slots)
        if host.address in hosts:
            raise LaunchError(
                f"{where}: {host.address} is there already in line {hosts[host.address][0]};"
                " name each node once, with all its slots"
            )
        hosts[host.address] = (number, host)
    if not hosts:
        raise LaunchError(f"{path}: no host in it; write a line like 'node1 slots=8' for each node")
    return [host for _, host in hosts.values()]


def read_deepspeed_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that DeepSpeed sets on every node: `.deepspeed_env` at home, then here.

    Args:
        environ: its DS_ENV_FILE is another name for the file.

    Raises:
        LaunchError: a line is not NAME=value; DeepSpeed takes no comments and no empty lines.
    """
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    found = {}
    for folder in (os.path.expanduser("~"), "."):
        path = Path(folder, name)
        if not path.is_file():
            continue
        for number, line in enumerate(_lines(path), start=1):
            match = _VARIABLE.fullmatch(line)
            if not match:
                raise LaunchError(
                    f"{path}, line {number}: {line[:80]!r} is not NAME=value; DeepSpeed takes"
                    " neither comments nor empty lines there"
                )
            found[match["name"]] = match["value"].strip()
    return found


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise LaunchError(f"{path}: larger than {_MAX_BYTES} bytes, this is another file")
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise LaunchError(
            f"{path}: {error.strerror or error}; see launchers/hostfile.example"
        ) from None
    except UnicodeDecodeError:
        raise LaunchError(f"{path}: is not text") from None
