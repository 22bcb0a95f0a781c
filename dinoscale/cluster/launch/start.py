"""Which way a run is started, and the checks that this way allows before it."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinoscale.cluster.doctor.environment import steering_names
from dinoscale.cluster.doctor.report import Check, Report, ok, problem, warning
from dinoscale.cluster.launch import commands
from dinoscale.cluster.launch.ask_nodes import Found, Question, ask_all
from dinoscale.cluster.launch.hostfile import (
    Host,
    holds_secret,
    read_deepspeed_env,
    read_hostfile,
    taking_part,
)
from dinoscale.cluster.launch.judge_nodes import judge, table
from dinoscale.errors import LaunchError

_HOST = re.compile(r"\w[\w.:-]*", re.ASCII)
_FORWARDED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # by DeepSpeed; NCCL where there are GPUs
_PROGRAMS = {"pdsh": ("ssh", "pdsh"), "openmpi": ("ssh", "mpirun")}


@dataclass(frozen=True)
class Way:
    """How a run is started.

    Attributes:
        command: the command line, as words.
        hosts: nodes that can be asked beforehand.
        address: of rank 0, as the others will look for it; empty if it is not known yet.
        port: of rank 0.
        ssh: `ssh` and its options; None: only this machine is asked.
        meets: the first of `hosts` is where rank 0 will run.
        programs: needed here.
        variables: that DeepSpeed sets on every node.
    """

    command: list[str]
    hosts: list[Host]
    address: str = ""
    port: int = 0
    ssh: list[str] | None = None
    meets: bool = False
    programs: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Wishes:
    """What was asked for on the command line; see `dinoscale launch --help`."""

    config: str
    overrides: list[str]
    hostfile: str | None
    launcher: str
    ssh_options: list[str]
    nodes: int | None
    node_rank: int | None
    per_node: int | None
    master_addr: str | None
    master_port: int | None
    slurm: bool
    options: list[str]

    @property
    def training(self) -> list[str]:
        """What runs on each node, after `-m dinoscale`."""
        return ["train", self.config, *self.overrides]

    @property
    def port(self) -> int:
        """Where the ranks meet."""
        return commands.PORT if self.master_port is None else self.master_port


def choose(wishes: Wishes) -> Way:
    """The way of starting that was asked for.

    Raises:
        LaunchError: wishes contradict each other or are impossible, or the hostfile is wrong.
    """
    if wishes.hostfile is not None:
        name, used = "--hostfile", {"launcher", "ssh_options", "node_rank"}
        used |= {"master_addr", "master_port"}
    elif wishes.slurm:
        name, used = "--slurm", {"nodes", "per_node"}
    elif wishes.nodes is not None:
        name, used = "--nodes", {"nodes", "node_rank", "per_node", "master_addr", "master_port"}
    else:
        raise LaunchError("say how: --hostfile FILE, --nodes N, or --slurm; see launch --help")
    _refuse_unused(wishes, name, used)
    _require_ranges(wishes)
    _refuse_secrets([*wishes.options, *wishes.ssh_options])
    if wishes.slurm:
        return _by_slurm(wishes)
    return _by_hostfile(wishes, wishes.hostfile) if wishes.hostfile else _by_torchrun(wishes)


def _refuse_unused(wishes: Wishes, way: str, used: set[str]) -> None:
    """A wish that this way cannot fulfil would be forgotten without a word."""
    given = asdict(wishes)
    if given["launcher"] == "pdsh":
        given["launcher"] = None
    for name in given.keys() - used - {"config", "overrides", "options", "hostfile", "slurm"}:
        if given[name] not in (None, []):
            raise LaunchError(
                f"--{name.replace('_', '-')}: has no meaning with {way}; leave it out"
            )
    if way == "--hostfile" and wishes.slurm:
        raise LaunchError("--slurm: has no meaning with --hostfile; leave one out")


def _require_ranges(wishes: Wishes) -> None:
    ranges = {"nodes": (1, 10**6), "per_node": (1, 1024), "master_port": (1, 65535)}
    for name, (low, high) in ranges.items():
        value = getattr(wishes, name)
        if value is not None and not low <= value <= high:
            raise LaunchError(f"--{name.replace('_', '-')}={value} is not in {low}..{high}")
    address = wishes.master_addr
    if address is not None and not _HOST.fullmatch(address):
        raise LaunchError(f"--master-addr={address!r} is no host name and no address")


def _refuse_secrets(words: Sequence[str]) -> None:
    """The line that starts the nodes is printed, and every user of a node can read it there."""
    for word in words:
        for assignment in word.split(","):  # of --export=ALL,NAME=value two
            *names, value = assignment.split("=")
            for name in names:
                if holds_secret(name.strip("-"), value):
                    raise LaunchError(
                        f"--options, --ssh-options: {name} holds a secret, which would be printed"
                        " and stand on command lines that every user of a node can read; export it"
                        " here, and name it without its value"
                    )


def _by_hostfile(wishes: Wishes, hostfile: str) -> Way:
    hosts = read_hostfile(Path(hostfile))
    if wishes.launcher == "pdsh":
        hosts = taking_part(hosts, wishes.options)
    address = wishes.master_addr or hosts[0].address
    meeting: dict[str, Any] = {"address": address, "port": wishes.port, "options": wishes.options}
    if wishes.node_rank is not None:
        return _without_ssh(wishes, hostfile, hosts, meeting)
    ssh = wishes.ssh_options
    if wishes.launcher == "openmpi":
        command = commands.over_openmpi(
            wishes.training, hosts, hostfile=hostfile, ssh_options=ssh, **meeting
        )
    else:
        command = commands.over_pdsh(
            wishes.training, hosts, hostfile=hostfile, ssh_options=ssh, **meeting
        )
    return Way(
        [*_without_secrets(os.environ), *command],
        hosts,
        address,
        wishes.port,
        ssh=["ssh", *ssh],
        meets=True,
        programs=_PROGRAMS[wishes.launcher],
        variables=read_deepspeed_env(os.environ),
    )


def _without_secrets(environ: Mapping[str, str]) -> list[str]:
    """What comes before a command: DeepSpeed would write their values on command lines."""
    names = [
        name
        for name, value in environ.items()
        if name.startswith(_FORWARDED) and holds_secret(name, value)
    ]
    return ["env", *(f"--unset={name}" for name in sorted(names))] if names else []


def _without_ssh(wishes: Wishes, hostfile: str, hosts: list[Host], meeting: dict[str, Any]) -> Way:
    rank = wishes.node_rank
    assert rank is not None
    if not 0 <= rank < len(hosts):
        raise LaunchError(f"--node-rank={rank} is not in 0..{len(hosts) - 1}, as {hostfile} says")
    if wishes.launcher != "pdsh" or wishes.ssh_options:
        raise LaunchError("--launcher, --ssh-options: with --node-rank no other node is reached")
    command = commands.without_ssh(wishes.training, hostfile=hostfile, node_rank=rank, **meeting)
    return Way(command, [hosts[rank]], meeting["address"], wishes.port, meets=rank == 0)


def _by_torchrun(wishes: Wishes) -> Way:
    nodes, rank, address = wishes.nodes, wishes.node_rank, wishes.master_addr
    if nodes is None or rank is None or address is None:
        raise LaunchError("--nodes: needs --node-rank R and --master-addr HOST too, on each node")
    if not 0 <= rank < nodes:
        raise LaunchError(f"--node-rank={rank} is not in 0..{nodes - 1}, as --nodes says")
    command = commands.by_torchrun(
        wishes.training,
        nodes=nodes,
        node_rank=rank,
        per_node=wishes.per_node,
        address=address,
        port=wishes.port,
        options=wishes.options,
    )
    here = Host(socket.gethostname(), wishes.per_node)
    return Way(command, [here], address, wishes.port, meets=rank == 0)


def _by_slurm(wishes: Wishes) -> Way:
    command = commands.by_slurm(
        wishes.training[1:],
        nodes=wishes.nodes,
        per_node=wishes.per_node,
        options=wishes.options,
    )
    return Way(command, [], programs=("sbatch",))


def check(
    way: Way, wishes: Wishes, *, run_dir: str, timeout_s: float
) -> tuple[list[Found], Report]:
    """Ask the nodes, print what they are and what is wrong, and give it back.

    Args:
        way: chosen.
        wishes: it was chosen from.
        run_dir: of the run.
        timeout_s: for each answer of a node.

    Returns:
        What the nodes answered, and the checks.

    Raises:
        LaunchError: a program is not installed here.
    """
    report = Report(active=True)
    for program in way.programs:
        if shutil.which(program) is None:
            raise LaunchError(f"{program} is not installed here; see launchers/README.md")
    if not way.hosts:
        report.section("slurm", _submittable(way.command))
        report.close()
        return [], report
    question = Question(
        config=(wishes.config, wishes.overrides),
        run_dir=run_dir,
        address=way.address,
        port=way.port,
        variables=way.variables,
        ssh=way.ssh,
        meets=way.meets,
        timeout_s=timeout_s,
    )
    found = ask_all(way.hosts, question)
    print(table(found), file=sys.stderr, flush=True)
    report.section("nodes", judge(found, question))
    if way.ssh is not None:
        report.section("environment", _not_forwarded(way.variables))
    report.close()
    return found, report


def _submittable(command: list[str]) -> list[Check]:
    """Slurm's own opinion; its nodes are not known before it gives them."""
    words = [command[0], "--test-only", *command[1:]]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return [problem("sbatch", "does not answer within 60 s; ask `scontrol ping`")]
    said = (done.stderr.strip().splitlines() or ["says nothing"])[-1]
    if done.returncode:
        return [problem("sbatch", f"{said}; change the resources, see `sinfo`")]
    return [ok("sbatch", f"{said}; the nodes are not known yet, `doctor` under srun checks them")]


def _not_forwarded(variables: dict[str, str]) -> list[Check]:
    """Variables that steer libraries here, and on the nodes only where a profile sets them."""
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    forwarded = _FORWARDED if has_gpu else _FORWARDED[:-1]
    names = [
        name
        for name in steering_names(os.environ)
        if name not in variables and not name.startswith(forwarded)
    ]
    if not names:
        return [ok("variables", f"{', '.join(sorted(variables)) or 'none'} set on every node")]
    return [
        warning(
            "variables",
            f"{', '.join(names)}: set here, and DeepSpeed does not hand it to the nodes; write"
            " NAME=value into .deepspeed_env, or a secret into a file there: see"
            " launchers/README.md",
        )
    ]
