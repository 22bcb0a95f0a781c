"""The command line of each launcher, as words; `shlex.join` of them can be pasted into a shell.

All end in the same words, `train CONFIG section.key=value ...`.
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
# ssh would wait for hours for a node that lost power or its network, and the launcher with it.
# Whatever --ssh-options says comes first, and the first value counts.
_GIVE_UP = ("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3")
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)  # words that no shell changes


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
    """DeepSpeed's own launcher: pdsh, and under it ssh, starts a program on each node.

    Args:
        training: `train`, CONFIG and settings.
        hosts: of the hostfile.
        hostfile: path, as given.
        address: name or address of the first host, for all of them.
        port: where they meet there.
        ssh_options: for every ssh; pdsh splits them at spaces.
        options: more options of `deepspeed`.

    Raises:
        LaunchError: something would not pass through the shells in between.
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
            f"--ssh-options: pdsh splits at spaces, {spaced[0]!r} cannot be one word; put it into"
            " a file of its own for -F"
        )
    return [
        *("env", f"PDSH_SSH_ARGS_APPEND={' '.join([*ssh_options, *_GIVE_UP])}"),
        *_DEEPSPEED,
        *("--hostfile", hostfile),
        *(["--force_multi"] if len(hosts) == 1 else []),  # else DeepSpeed trains here, not there
        "--no_ssh_check",  # it knows no ssh options; every host is checked before
        *("--master_addr", address, "--master_port", str(port)),
        *options,
        *("--module", "dinoscale", *map(quote_for_pdsh, training)),
    ]


def quote_for_pdsh(argument: str) -> str:
    """Quote an argument so that it reaches the nodes as it is.

    DeepSpeed puts what has a space into double quotes, and nothing around anything else; pdsh
    replaces %n, %h, %u and %%; the shell of the node reads the rest: without this, the
    `{000..099}` of a tar pattern would become a hundred arguments.
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
    """DeepSpeed's launcher with mpirun under it; arguments as for `over_pdsh`, options of mpirun.

    mpirun numbers the processes; where they meet, it has to be told.

    Raises:
        LaunchError: a host names a user, for which mpirun's hostfile has no such form.
    """
    users = [host.name for host in hosts if "@" in host.name]
    if users:
        raise LaunchError(f"{hostfile}: mpirun takes no {users[0]!r}; -o User=... in --ssh-options")
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
    """DeepSpeed's launcher for the processes of this node alone; every node is given its line."""
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
    """Torchrun for the processes of this node; `per_node` None: one for each GPU."""
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
    """Submit launchers/slurm.sbatch; None: as many as its own `#SBATCH` lines say.

    Args:
        arguments: CONFIG and settings; the script says `train`.
        nodes: of the job.
        per_node: processes, and GPUs, of a node.
        options: more options of `sbatch`.

    Raises:
        LaunchError: the script is not there.
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
    raise LaunchError(f"launchers/{name} is not beside the package; install dinoscale anew")
