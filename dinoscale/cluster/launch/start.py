"""Choose how to start a run, and make the checks that this method allows."""

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
from dinoscale.cluster.launch.ask_nodes import NodeAnswers, Question, ask_all
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
_FORWARDED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # by DeepSpeed; NCCL if there are GPUs
_PROGRAMS = {"pdsh": ("ssh", "pdsh"), "openmpi": ("ssh", "mpirun")}


@dataclass(frozen=True)
class Method:
    """How to start a run.

    Attributes:
        command: the command line, as arguments.
        hosts: nodes that can be checked beforehand.
        address: of rank 0, as the other ranks will look for it; empty if not known yet.
        port: of rank 0.
        ssh: `ssh` and its options; None to ask only this machine.
        meets: whether rank 0 will run on the first of `hosts`.
        programs: needed on this machine.
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
class LaunchRequest:
    """Options of the command line; see `dinoscale launch --help`."""

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
        """Arguments after `-m dinoscale` on each node."""
        return ["train", self.config, *self.overrides]

    @property
    def port(self) -> int:
        """Port where the ranks meet."""
        return commands.PORT if self.master_port is None else self.master_port


def choose(request: LaunchRequest) -> Method:
    """Choose the method that the options ask for.

    Raises:
        LaunchError: the options contradict each other or are out of range, or the hostfile is
            invalid.
    """
    if request.hostfile is not None:
        name, used = "--hostfile", {"launcher", "ssh_options", "node_rank"}
        used |= {"master_addr", "master_port"}
    elif request.slurm:
        name, used = "--slurm", {"nodes", "per_node"}
    elif request.nodes is not None:
        name, used = "--nodes", {"nodes", "node_rank", "per_node", "master_addr", "master_port"}
    else:
        raise LaunchError("give --hostfile FILE, --nodes N, or --slurm; see launch --help")
    _refuse_unused(request, name, used)
    _require_ranges(request)
    _refuse_secrets([*request.options, *request.ssh_options])
    if request.slurm:
        return _by_slurm(request)
    return _by_hostfile(request, request.hostfile) if request.hostfile else _by_torchrun(request)


def _refuse_unused(request: LaunchRequest, method: str, used: set[str]) -> None:
    """Refuse options that this method would ignore."""
    given = asdict(request)
    if given["launcher"] == "pdsh":
        given["launcher"] = None
    for name in given.keys() - used - {"config", "overrides", "options", "hostfile", "slurm"}:
        if given[name] not in (None, []):
            raise LaunchError(f"--{name.replace('_', '-')}: has no effect with {method}; omit it")
    if method == "--hostfile" and request.slurm:
        raise LaunchError("--slurm: has no effect with --hostfile; omit one of them")


def _require_ranges(request: LaunchRequest) -> None:
    ranges = {"nodes": (1, 10**6), "per_node": (1, 1024), "master_port": (1, 65535)}
    for name, (low, high) in ranges.items():
        value = getattr(request, name)
        if value is not None and not low <= value <= high:
            raise LaunchError(f"--{name.replace('_', '-')}={value} is not in {low}..{high}")
    address = request.master_addr
    if address is not None and not _HOST.fullmatch(address):
        raise LaunchError(f"--master-addr={address!r} is neither a host name nor an address")


def _refuse_secrets(words: Sequence[str]) -> None:
    """Refuse secrets: the command line is printed, and every user of a node can read it there."""
    for word in words:
        for assignment in word.split(","):  # --export=ALL,NAME=value holds two
            *names, value = assignment.split("=")
            for name in names:
                if holds_secret(name.strip("-"), value):
                    raise LaunchError(
                        f"--options, --ssh-options: {name} holds a secret, which would be printed,"
                        " and every user of a node could read it on command lines; export it here,"
                        " and give only its name"
                    )


def _by_hostfile(request: LaunchRequest, hostfile: str) -> Method:
    hosts = read_hostfile(Path(hostfile))
    if request.launcher == "pdsh":
        hosts = taking_part(hosts, request.options)
    address = request.master_addr or hosts[0].address
    meeting: dict[str, Any] = {"address": address, "port": request.port, "options": request.options}
    if request.node_rank is not None:
        return _without_ssh(request, hostfile, hosts, meeting)
    ssh = request.ssh_options
    if request.launcher == "openmpi":
        command = commands.over_openmpi(
            request.training, hosts, hostfile=hostfile, ssh_options=ssh, **meeting
        )
    else:
        command = commands.over_pdsh(
            request.training, hosts, hostfile=hostfile, ssh_options=ssh, **meeting
        )
    return Method(
        [*_without_secrets(os.environ), *command],
        hosts,
        address,
        request.port,
        ssh=["ssh", *ssh],
        meets=True,
        programs=_PROGRAMS[request.launcher],
        variables=read_deepspeed_env(os.environ),
    )


def _without_secrets(environ: Mapping[str, str]) -> list[str]:
    """A prefix that unsets secrets, whose values DeepSpeed would write on command lines."""
    names = [
        name
        for name, value in environ.items()
        if name.startswith(_FORWARDED) and holds_secret(name, value)
    ]
    return ["env", *(f"--unset={name}" for name in sorted(names))] if names else []


def _without_ssh(
    request: LaunchRequest, hostfile: str, hosts: list[Host], meeting: dict[str, Any]
) -> Method:
    rank = request.node_rank
    assert rank is not None
    if not 0 <= rank < len(hosts):
        last = len(hosts) - 1
        raise LaunchError(f"--node-rank={rank} is not in 0..{last}, the hosts of {hostfile}")
    if request.launcher != "pdsh" or request.ssh_options:
        raise LaunchError("--launcher, --ssh-options: have no effect with --node-rank; omit them")
    command = commands.without_ssh(request.training, hostfile=hostfile, node_rank=rank, **meeting)
    return Method(command, [hosts[rank]], meeting["address"], request.port, meets=rank == 0)


def _by_torchrun(request: LaunchRequest) -> Method:
    nodes, rank, address = request.nodes, request.node_rank, request.master_addr
    if nodes is None or rank is None or address is None:
        raise LaunchError("--nodes: also needs --node-rank R and --master-addr HOST, on each node")
    if not 0 <= rank < nodes:
        raise LaunchError(f"--node-rank={rank} is not in 0..{nodes - 1}, the ranks of --nodes")
    command = commands.by_torchrun(
        request.training,
        nodes=nodes,
        node_rank=rank,
        per_node=request.per_node,
        address=address,
        port=request.port,
        options=request.options,
    )
    here = Host(socket.gethostname(), request.per_node)
    return Method(command, [here], address, request.port, meets=rank == 0)


def _by_slurm(request: LaunchRequest) -> Method:
    command = commands.by_slurm(
        request.training[1:],
        nodes=request.nodes,
        per_node=request.per_node,
        options=request.options,
    )
    return Method(command, [], programs=("sbatch",))


def check(
    method: Method, request: LaunchRequest, *, run_dir: str, timeout_s: float
) -> tuple[list[NodeAnswers], Report]:
    """Ask the nodes, and print a table of them and the faults.

    Args:
        method: of starting the run.
        request: from which it was chosen.
        run_dir: of the run.
        timeout_s: for each answer of a node.

    Returns:
        The answers of the nodes, and the checks.

    Raises:
        LaunchError: a program is not installed on this machine.
    """
    report = Report(active=True)
    for program in method.programs:
        if shutil.which(program) is None:
            raise LaunchError(f"{program} is not installed here; see launchers/README.md")
    if not method.hosts:
        report.section("slurm", _submittable(method.command))
        report.close()
        return [], report
    question = Question(
        config=(request.config, request.overrides),
        run_dir=run_dir,
        address=method.address,
        port=method.port,
        variables=method.variables,
        ssh=method.ssh,
        meets=method.meets,
        timeout_s=timeout_s,
    )
    found = ask_all(method.hosts, question)
    print(table(found), file=sys.stderr, flush=True)
    report.section("nodes", judge(found, question))
    if method.ssh is not None:
        report.section("environment", _not_forwarded(method.variables))
    report.close()
    return found, report


def _submittable(command: list[str]) -> list[Check]:
    """The result of `sbatch --test-only`; the nodes are unknown until Slurm allocates them."""
    words = [command[0], "--test-only", *command[1:]]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return [problem("sbatch", "does not answer within 60 s; check `scontrol ping`")]
    said = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode:
        return [problem("sbatch", f"{said}; change the resources, see `sinfo`")]
    return [ok("sbatch", f"{said}; the nodes are not known yet, `doctor` under srun checks them")]


def _not_forwarded(variables: dict[str, str]) -> list[Check]:
    """Find variables that affect libraries here, but that DeepSpeed does not set on the nodes."""
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
            f"{', '.join(names)}: set here, but DeepSpeed does not pass it to the nodes; write"
            " NAME=value into .deepspeed_env, or a secret into a file there: see"
            " launchers/README.md",
        )
    ]
