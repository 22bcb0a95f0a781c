"""The command line of each launcher, as a list of arguments; `shlex.join` makes it a shell line.

All end in the same arguments, `train CONFIG section.key=value ...`.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dinoscale.cluster.launch.hostfile import Host
from dinoscale.errors import LaunchError

PORT = 29500  # of DeepSpeed and torchrun
_DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")  # `deepspeed` of this environment
_TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# Without these, ssh waits for hours for a node that lost power or network, and so does the
# launcher. They follow --ssh-options: ssh takes the first value of an option.
_GIVE_UP = ("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3")
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)  # text that no shell changes


def over_pdsh(
    training: Sequence[str],
    hosts: Sequence[Host],
    *,
    hostfile: str,
    address: str,
    port: int,
    ssh_options: Sequence[str],
    options: Sequence[str],
) -> list[str]:
    """DeepSpeed's own launcher: pdsh starts a program on each node over ssh.

    Args:
        training: `train`, CONFIG and settings.
        hosts: of the hostfile.
        hostfile: path, as given.
        address: name or address of the first host, as seen by all hosts.
        port: on the first host, where the ranks meet.
        ssh_options: for every ssh; pdsh splits them at spaces.
        options: more options of `deepspeed`.

    Raises:
        LaunchError: the shells on the way would change an argument.
    """
    for name, word in (("this directory", str(Path.cwd())), ("the interpreter", sys.executable)):
        if not _PLAIN.fullmatch(word):
            raise LaunchError(
                f"{name}, {word!r}, has characters that DeepSpeed does not quote for the nodes;"
                " use a path of letters, digits and ./_-"
            )
    spaced = [option for option in ssh_options if not option or re.search(r"\s", option)]
    if spaced:
        raise LaunchError(
            f"--ssh-options: pdsh splits at spaces, so {spaced[0]!r} cannot be one argument; write"
            " it into an ssh configuration file, and give that with -F"
        )
    return [
        *("env", f"PDSH_SSH_ARGS_APPEND={' '.join([*ssh_options, *_GIVE_UP])}"),
        *_DEEPSPEED,
        *("--hostfile", hostfile),
        *(["--force_multi"] if len(hosts) == 1 else []),  # else DeepSpeed trains on this machine
        "--no_ssh_check",  # it ignores --ssh-options; we have checked every host
        *("--master_addr", address, "--master_port", str(port)),
        *options,
        *("--module", "dinoscale", *map(quote_for_pdsh, training)),
    ]


def quote_for_pdsh(argument: str) -> str:
    """Quote an argument so that it reaches the nodes unchanged.

    DeepSpeed puts arguments with a space into double quotes, and does not quote others; pdsh
    replaces %n, %h, %u and %%; the shell of the node expands the result. Unquoted, the `{000..099}`
    of a tar pattern would become a hundred arguments.
    """
    in_double_quotes = re.sub(r"[\\$`]", r"\\\g<0>", argument)
    quoted = in_double_quotes if " " in argument else shlex.quote(argument)
    return quoted.replace("%", "%%")


def over_openmpi(
    training: Sequence[str],
    hosts: Sequence[Host],
    *,
    hostfile: str,
    address: str,
    port: int,
    ssh_options: Sequence[str],
    options: Sequence[str],
) -> list[str]:
    """DeepSpeed's launcher over mpirun; arguments as for `over_pdsh`, but `options` are mpirun's.

    mpirun sets the ranks, but not the address and port where they meet.

    Raises:
        LaunchError: a host has the form user@host, which mpirun's hostfile does not allow.
    """
    users = [host.name for host in hosts if "@" in host.name]
    if users:
        raise LaunchError(
            f"{hostfile}: mpirun does not take {users[0]!r}; give --ssh-options '-o User=NAME'"
        )
    ssh = ["--mca", "plm_rsh_args", " ".join(ssh_options)] if ssh_options else []
    meeting = ["-x", f"MASTER_ADDR={address}", "-x", f"MASTER_PORT={port}"]
    return [
        *_DEEPSPEED,
        *("--hostfile", hostfile, "--launcher", "openmpi", "--force_multi", "--no_ssh_check"),
        *("--master_addr", address, "--master_port", str(port)),
        f"--launcher_args={shlex.join([*ssh, *meeting, *options])}",
        *("--module", "dinoscale", *training),
    ]


def without_ssh(
    training: Sequence[str],
    *,
    hostfile: str,
    node_rank: int,
    address: str,
    port: int,
    options: Sequence[str],
) -> list[str]:
    """DeepSpeed's launcher for the processes of this node; call it on every node."""
    return [
        *_DEEPSPEED,
        *("--hostfile", hostfile, "--no_ssh", "--node_rank", str(node_rank)),
        *("--master_addr", address, "--master_port", str(port)),
        *options,
        *("--module", "dinoscale", *training),
    ]


def by_torchrun(
    training: Sequence[str],
    *,
    nodes: int,
    node_rank: int,
    per_node: int | None,
    address: str,
    port: int,
    options: Sequence[str],
) -> list[str]:
    """Torchrun for the processes of this node; `per_node=None` starts one for each GPU."""
    return [
        *_TORCHRUN,
        *("--nnodes", str(nodes), "--node-rank", str(node_rank)),
        *("--nproc-per-node", "gpu" if per_node is None else str(per_node)),
        *("--master-addr", address, "--master-port", str(port)),
        *options,
        *("-m", "dinoscale", *training),
    ]


def by_slurm(
    arguments: Sequence[str], *, nodes: int | None, per_node: int | None, options: Sequence[str]
) -> list[str]:
    """Submit launchers/slurm.sbatch; its own `#SBATCH` lines hold for what is None.

    Args:
        arguments: CONFIG and settings; the script adds `train`.
        nodes: number of nodes.
        per_node: processes, and GPUs, per node.
        options: more options of `sbatch`.

    Raises:
        LaunchError: the script is missing.
    """
    resources = [] if nodes is None else ["--nodes", str(nodes)]
    if per_node is not None:
        resources += ["--ntasks-per-node", str(per_node), "--gpus-per-node", str(per_node)]
    return ["sbatch", *resources, *options, str(_script("slurm.sbatch")), *arguments]


def _script(name: str) -> Path:
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "launchers", package.parent / "launchers"):  # installed, checkout
        if (folder / name).is_file():
            return folder / name
    raise LaunchError(f"launchers/{name} is not beside the package; reinstall dinoscale")
