"""The nodes of a job at its start: log a line for each, and refuse nodes that differ.

A different library or file on one node trains wrong numbers or hangs hours later; here it is
refused in the first seconds, on every rank. The checks are the doctor's.
"""

import hashlib
import logging
import os
import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dinoscale.cluster.doctor.configs import judge_configs
from dinoscale.cluster.doctor.network import judge_clocks
from dinoscale.cluster.doctor.report import Check
from dinoscale.cluster.doctor.storage import check_shared
from dinoscale.cluster.doctor.versions import judge_equal
from dinoscale.config import RunConfig, dump_config
from dinoscale.errors import LaunchError
from dinoscale.runtime import distributed, logs
from dinoscale.runtime.hosts import ranks_text, span_text
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.versions import commit, package_version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """Facts of one rank, which all ranks compare.

    Attributes:
        host: name of its node.
        node_rank: number of the node, None if the launcher does not set it.
        device: name of its accelerator, or "CPU".
        versions: of the software that must be the same on all nodes.
        digest: of its configuration.
    """

    host: str
    node_rank: int | None
    device: str
    versions: dict[str, str | None]
    digest: str


def gather_members(config: RunConfig, process: Process) -> list[Member]:
    """Facts of every rank, in rank order; all ranks call it together.

    Raises:
        RunFailedError: on every rank, if one cannot gather its facts.
    """
    return distributed.gather_objects(distributed.together(lambda: _member(config, process)))


def _member(config: RunConfig, process: Process) -> Member:
    found = {name: package_version(name) for name in ("dinoscale", "torch", "deepspeed")}
    found["python"] = platform.python_version()
    code = commit() if process.local_rank == 0 else None  # git is slow: once per node
    on_cpu = process.device.type == "cpu"
    return Member(
        host=socket.gethostname(),
        node_rank=process.node_rank,
        device="CPU" if on_cpu else torch.cuda.get_device_name(process.device),
        versions=found | ({"commit": code} if code else {}),
        digest=hashlib.sha256(dump_config(config).encode()).hexdigest(),
    )


def require_alike(config: RunConfig, process: Process, members: Sequence[Member]) -> None:
    """Log the nodes, and refuse them if versions or configurations differ.

    Raises:
        LaunchError: on every rank; the text names the hosts.
    """
    hosts = [member.host for member in members]
    if process.rank == 0:
        for line in node_lines(members, process.launcher):
            log.info("%s", line)
    clock = judge_clocks([[at] for at in distributed.gather_objects(time.time())], hosts)
    if clock.verdict != "ok" and process.rank == 0:
        log.warning("clocks: %s", clock.text)
    checks = judge_equal([member.versions for member in members], hosts)
    if any(member.digest != members[0].digest for member in members):
        checks.append(judge_configs(distributed.gather_objects(dump_config(config)), hosts))
    _refuse(checks)


def node_lines(members: Sequence[Member], launcher: str | None) -> list[str]:
    """A line for each node; versions only of the first, or where they differ from the first's."""
    of_node: dict[tuple[str, int | None], list[int]] = {}
    for rank, member in enumerate(members):
        of_node.setdefault((member.host, member.node_rank), []).append(rank)
    lines: list[str] = []
    for (host, _), ranks in of_node.items():
        own, first = members[ranks[0]], members[0].versions
        other = {n: v for n, v in own.versions.items() if not lines or v != first.get(n)}
        versions = [f"{name} {version}" for name, version in other.items() if version]
        device = f"{len(ranks)} x {own.device}" if own.device != "CPU" else "the CPU"
        started = f"started by {launcher}" if launcher else "started alone"
        here = f"node {host}: {span_text(ranks)} on {device}"
        lines.append(", ".join([here, started, *versions]))
    return lines


def require_shared(folder: Path, hosts: list[str], *, name: str = "run_dir") -> None:
    """Refuse a folder that the nodes do not share; all ranks call it together.

    Args:
        folder: which rank 0 can write to.
        hosts: of all ranks.
        name: what messages call it.

    Raises:
        LaunchError: on every rank; the text names the hosts.
    """
    if len(hosts) > 1:
        _refuse([check_shared(folder, hosts, name=name)])


def _refuse(checks: Sequence[Check]) -> None:
    problems = [f"{check.name}: {check.text}" for check in checks if check.verdict == "problem"]
    if problems:
        raise LaunchError("; ".join(problems))


def keep_logs(run_dir: Path, process: Process, members: Sequence[Member]) -> None:
    """Open the log file of every rank; if that fails, rank 0 warns and the run continues."""
    own, hosts = members[process.rank], [member.host for member in members]
    versions = ", ".join(f"{name} {version}" for name, version in own.versions.items() if version)
    failures = distributed.gather_objects(
        logs.to_file(
            run_dir / "logs",
            rank=process.rank,
            header=f"rank {process.rank} of {process.world_size} on {own.host}, local rank"
            f" {process.local_rank}, {own.device}, process {os.getpid()}; {versions}",
        )
    )
    without = [rank for rank, failure in enumerate(failures) if failure]
    if without and process.rank == 0:
        where = f"{run_dir / 'logs'} ({failures[without[0]]})"
        log.warning("no log files of %s: cannot write to %s", ranks_text(without, hosts), where)
