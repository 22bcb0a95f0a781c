"""DeepSpeed's hostfile, and the variables of `.deepspeed_env` that it passes to the nodes.

DeepSpeed checks neither file: it ignores text after `slots=8`, and an empty line in
`.deepspeed_env` ends it with a traceback. Here every line is checked, and errors name it.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoscale.config.secrets import hide_secrets, is_secret_name
from dinoscale.errors import LaunchError

_MAX_SLOTS = 1024  # no node has more; DeepSpeed builds a list of that length
_MAX_BYTES = 10**6
_NAME = r"(?:\w[\w.-]*@)?\w[\w.-]*"  # no leading dash: ssh would take it for an option
_LINE = re.compile(rf"(?P<name>{_NAME})\s+slots=(?P<slots>\d{{1,9}})\s*(?:#.*)?", re.ASCII)
_VARIABLE = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.ASCII)
_PLAIN_VARIABLES = ("DINOSCALE_CACHE", "DINOSCALE_CACHE_GB", "DINOSCALE_ALLOW_PIPE")
_SECRET_REMEDY = (
    "put the value into a file that only you can read (chmod 600) and all nodes have, and write"
    ' {0}="$(cat FILE)"; with mpirun, export it here and give --options "-x {0}"'
)


@dataclass(frozen=True)
class Host:
    """A node of the run.

    Attributes:
        name: for ssh, as given; perhaps `user@node`.
        slots: number of processes, None for one per GPU.
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
        LaunchError: the file cannot be read, or a line is invalid.
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
                f"{where}: {host.address} is already in line {hosts[host.address][0]};"
                " name each node once, with all its slots"
            )
        hosts[host.address] = (number, host)
    if not hosts:
        raise LaunchError(f"{path}: names no host; write a line like 'node1 slots=8' for each node")
    return [host for _, host in hosts.values()]


def taking_part(hosts: list[Host], options: Sequence[str]) -> list[Host]:
    """The hosts and slots that DeepSpeed's own options select, in order.

    Args:
        hosts: of the hostfile.
        options: of `deepspeed`; only --include, --exclude, --num_nodes and --num_gpus matter here.

    Raises:
        LaunchError: the options name a host that is not in the hostfile, or select none.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-i", "--include", default="")
    parser.add_argument("-e", "--exclude", default="")
    parser.add_argument("--num_nodes", type=int, default=-1)
    parser.add_argument("--num_gpus", "--num_accelerators", type=int, default=-1)
    given = parser.parse_known_args(list(options))[0]
    slots = {host.address: set(range(host.slots or 0)) for host in hosts}
    if given.include:
        slots = {name: some or slots[name] for name, some in _named(given.include, slots).items()}
    for name, some in _named(given.exclude, slots).items():
        slots[name] = slots[name] - some if some else set()
    left = [Host(host.name, len(slots[host.address])) for host in hosts if slots.get(host.address)]
    left = left[: given.num_nodes] if given.num_nodes > 0 else left
    if not left:
        raise LaunchError(f"--options: {' '.join(options)!r} leaves no host of the hostfile")
    most = given.num_gpus if given.num_gpus > 0 else _MAX_SLOTS
    return [Host(host.name, min(host.slots or 0, most)) for host in left]


def _named(text: str, slots: Mapping[str, set[int]]) -> dict[str, set[int]]:
    """The slots of each host in `node1@node2:0,2`; an empty set stands for all slots."""
    named: dict[str, set[int]] = {}
    for part in filter(None, text.split("@")):
        name, _, numbers = part.partition(":")
        if name not in slots or not re.fullmatch(r"[\d,]*", numbers):
            raise LaunchError(
                f"--options: {part!r} is not HOST or HOST:0,1 with a host of the hostfile:"
                f" {', '.join(slots)}"
            )
        named[name] = {int(number) for number in numbers.split(",") if number}
    return named


def read_deepspeed_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that DeepSpeed sets on every node: `.deepspeed_env` of home, then of this folder.

    Args:
        environ: its DS_ENV_FILE is another name for the file.

    Raises:
        LaunchError: a line is not NAME=value (DeepSpeed allows no comments or empty lines), or
            holds a secret, which DeepSpeed would write on command lines and to its log.
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
                    f"{path}, line {number}: {hide_secrets(line[:80])!r} is not NAME=value;"
                    " DeepSpeed allows neither comments nor empty lines there"
                )
            variable, value = match["name"], match["value"].strip()
            if holds_secret(variable, value):
                raise LaunchError(
                    f"{path}, line {number}: {variable} holds a secret, which DeepSpeed would write"
                    " on command lines of all nodes and to its log;"
                    f" {_SECRET_REMEDY.format(variable)}"
                )
            found[variable] = value
    return found


def holds_secret(name: str, value: str) -> bool:
    """Whether a variable is a password, key or signature, by its name or by a URL in its value.

    False if the shell of the node produces the value, as for "$(cat FILE)".
    """
    if {"$", "`"} & set(value):
        return False
    of_urls = name.startswith("DINOSCALE_") and name not in _PLAIN_VARIABLES
    return of_urls or is_secret_name(name) or hide_secrets(value) != value


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise LaunchError(f"{path}: larger than {_MAX_BYTES} bytes, so not a file of this kind")
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise LaunchError(
            f"{path}: {error.strerror or error}; see launchers/hostfile.example"
        ) from None
    except UnicodeDecodeError:
        raise LaunchError(f"{path}: is not a text file") from None
