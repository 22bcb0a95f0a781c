"""Rank of this process and address of rank 0, from the launcher's variables: read only here.

Sources are the manuals: torchrun (torch.distributed.run), deepspeed (its launcher/launch.py), Open
MPI ("Environment variables set for MPI applications"), Intel MPI and MPICH (mpiexec.hydra),
MVAPICH2 (mpirun_rsh), Slurm (srun, "OUTPUT ENVIRONMENT VARIABLES").
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dinoscale.errors import LaunchError

if TYPE_CHECKING:
    import torch

LOOPBACK = "127.0.0.1"
_PORT = 29500  # default of torchrun and deepspeed


@dataclass(frozen=True)
class Process:
    """One process of a job: global and per-node rank and world size, and the launcher.

    Attributes:
        rank: in 0..world_size-1.
        world_size: processes of the job.
        local_rank: number of this process, and of its device, on its node.
        local_world_size: processes on its node; those of the whole job if the launcher does not
            set it.
        launcher: None for a single process; "RANK" for variables set by hand.
        knows_node: whether the launcher set `local_world_size`.
        node_rank: number of the node, None if the launcher does not set it.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str | None = None
    knows_node: bool = True
    node_rank: int | None = None

    @property
    def device(self) -> torch.device:
        """The accelerator of this process, or the CPU where there is none."""
        import torch  # here: the rank is needed before torch is loaded, which takes seconds

        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


@dataclass(frozen=True)
class _Names:
    """Variables of one launcher, "" where it has none.

    Attributes:
        marker: is set if the launcher started this process.
        rank: of the process; launchers that share it are one source.
        world_size: the first of these that is set.
    """

    launcher: str
    marker: str
    rank: str
    world_size: tuple[str, ...]
    local_rank: str = ""
    local_world_size: str = ""
    node_rank: str = ""


_Reading = tuple[_Names, Process]

# A launcher that starts the processes itself comes before those that may have started it.
_LAUNCHERS = (
    _Names(
        *("torchrun", "LOCAL_WORLD_SIZE", "RANK", ("WORLD_SIZE",)),
        *("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    ),
    _Names(
        *("deepspeed", "LOCAL_SIZE", "RANK", ("WORLD_SIZE",)),
        *("LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK"),
    ),
    _Names("RANK", "RANK", "RANK", ("WORLD_SIZE",), "LOCAL_RANK"),
    _Names(  # its ..._NODE_RANK is a rank within the node
        *("OpenMPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
        *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    _Names(
        *("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",)),
        *("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ),
    _Names(  # and Intel MPI, whose launcher is the same
        *("MPICH", "MPI_LOCALRANKID", "PMI_RANK", ("PMI_SIZE",)),
        *("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ),
    # srun alone sets SLURM_STEP_ID: the variables of a batch script describe the job, not a task.
    # In an interactive step SLURM_NTASKS, too, describes the job.
    _Names(
        *("srun", "SLURM_STEP_ID", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
        *("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"),
    ),
    _Names("PMI", "PMI_RANK", "PMI_RANK", ("PMI_SIZE",)),  # for example `srun --mpi=pmi2`
)


def read_process(environ: Mapping[str, str]) -> Process:
    """Read rank and world size from the variables of the launcher; without one, a single process.

    Raises:
        LaunchError: a variable is missing or is not a number, or two contradict each other.
    """
    active: dict[str, _Names] = {}
    for names in _LAUNCHERS:
        if environ.get(names.marker):
            active.setdefault(names.rank, names)
    readings = [(names, _read(environ, names)) for names in active.values()]
    if not readings:
        return Process(rank=0, world_size=1, local_rank=0, local_world_size=1)
    first, *others = readings
    process = first[1]
    for other in others:
        _require_agreement(environ, first, other)
    if process.launcher == "RANK" and not environ.get("LOCAL_RANK"):
        same = (process.rank, process.world_size)
        more = [other for _, other in others if (other.rank, other.world_size) == same]
        return more[0] if more else process  # it knows the node as well
    return process


def _read(environ: Mapping[str, str], names: _Names) -> Process:
    """Read the variables of one launcher, and check that they agree."""
    launcher, size_name = names.launcher, _size_name(environ, names)
    rank, world = (_number(environ, launcher, name) for name in (names.rank, size_name))
    if rank is None or world is None:
        raise LaunchError(
            f"{launcher}: {names.marker} is set but {names.rank} or {size_name} is not;"
            " start with a launcher, or export both"
        )
    if not 0 <= rank < world:
        raise LaunchError(f"{launcher}: {names.rank}={rank} is not in 0..{world - 1} ({size_name})")
    node = _number(environ, launcher, names.node_rank)
    here = _ranks_of_node(environ, names, node)
    local = _number(environ, launcher, names.local_rank)
    local = rank if local is None else local
    if here is not None and not 0 <= local < here <= world:
        raise LaunchError(
            f"{launcher}: {names.local_rank}={local}, {here} ranks on this node"
            f" ({names.local_world_size}) and {size_name}={world} contradict each other;"
            " start all processes with one launcher"
        )
    return Process(rank, world, local, here or world, launcher, here is not None, node)


def _size_name(environ: Mapping[str, str], names: _Names) -> str:
    given = [name for name in names.world_size if environ.get(name)]
    return given[0] if given else names.world_size[0]


def _ranks_of_node(environ: Mapping[str, str], names: _Names, node: int | None) -> int | None:
    """Number of processes on this node, None if the launcher does not set it."""
    if names.launcher != "srun":
        return _number(environ, names.launcher, names.local_world_size)
    text = environ.get(names.local_world_size)
    return tasks_of_node(text, node) if text and node is not None else None


def tasks_of_node(text: str, node: int) -> int:
    """Number of tasks of a node in Slurm's notation: `2(x3),1` means 2, 2, 2 and 1.

    Raises:
        LaunchError: the text is not in that notation, or has fewer nodes.
    """
    after = 0
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            break
        after += int(match[2] or 1)
        if node < after:
            return int(match[1])
    raise LaunchError(
        f"srun: SLURM_STEP_TASKS_PER_NODE={text!r} has no entry for node SLURM_NODEID={node};"
        " unset SLURM_STEP_TASKS_PER_NODE if it is not Slurm's"
    )


def _number(environ: Mapping[str, str], launcher: str, name: str) -> int | None:
    text = environ.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{launcher}: {name}={text!r} is not a whole number") from None


def _require_agreement(environ: Mapping[str, str], first: _Reading, second: _Reading) -> None:
    """Require that two launchers agree, or that the second started the first once on each node."""
    (inner_names, inner), (outer_names, outer) = first, second
    same = (inner.rank, inner.world_size) == (outer.rank, outer.world_size)
    nested = outer.local_world_size == 1 and inner.local_world_size < inner.world_size
    if same or nested or outer.world_size == 1:
        return
    if inner.world_size != outer.world_size:
        one, other = _size_name(environ, inner_names), _size_name(environ, outer_names)
    else:
        one, other = inner_names.rank, outer_names.rank
    raise LaunchError(
        f"{one}={environ[one]} ({inner_names.launcher}) contradicts"
        f" {other}={environ[other]} ({outer_names.launcher}): use one launcher and unset the"
        " variables of the other, or start the first once on each node by the second"
        " (srun --ntasks-per-node=1 torchrun --nnodes=NODES ...)"
    )


def rendezvous_address(process: Process, environ: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of rank 0.

    Raises:
        LaunchError: the address is unknown, or the port is not valid.
    """
    address = environ.get("MASTER_ADDR") or _address_of_rank_0(process, environ)
    text = environ.get("MASTER_PORT") or str(_default_port(environ))
    if not (text.isdecimal() and 0 < int(text) < 2**16):
        raise LaunchError(f"MASTER_PORT={text!r} is no port; export a free one from 1024 to 65535")
    return address, int(text)


def _address_of_rank_0(process: Process, environ: Mapping[str, str]) -> str:
    launcher, here = process.launcher, process.local_world_size if process.knows_node else 1
    if here == process.world_size:
        return LOOPBACK
    if launcher in ("srun", "PMI"):  # srun has handed all of its variables to these tasks
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if nodes:
            return first_host(nodes)
        if environ.get("SLURM_LAUNCH_NODE_IPADDR"):
            return environ["SLURM_LAUNCH_NODE_IPADDR"]
    how = {
        "OpenMPI": "mpirun -x MASTER_ADDR=HOST ...",
        "MPICH": "mpiexec -genv MASTER_ADDR HOST ...",
        "MVAPICH": "mpirun_rsh ... MASTER_ADDR=HOST python ...",
    }.get(str(launcher), "export MASTER_ADDR=HOST")
    raise LaunchError(
        f"MASTER_ADDR is not set, and {launcher} does not say where rank 0 runs: name its node,"
        f" the first of the job, for all ranks: {how}"
    )


def first_host(nodes: str) -> str:
    """The first node of a Slurm node list: `rack[1-2]node[003-007,9],login` -> `rack1node003`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes


def _default_port(environ: Mapping[str, str]) -> int:
    """A different port for each job, as nodes may be shared."""
    job = _number(environ, "srun", "SLURM_JOB_ID")
    return _PORT if job is None else 20000 + job % 20000


def on_this_node(
    training: Sequence[str], *, processes: int, port: int, environ: Mapping[str, str]
) -> list[str]:
    """Command line that starts some processes on this machine, on the GPUs that are visible.

    It calls DeepSpeed's launcher. That knows GPUs by number only, and given a number of processes
    it ignores CUDA_VISIBLE_DEVICES and takes the first GPUs of the machine. Where the variable has
    UUIDs or too few GPUs, the line calls torchrun, which leaves it as it is.

    Args:
        training: `train`, CONFIG and settings.
        processes: number of ranks.
        port: a free port, where they meet.
        environ: environment that they will have.
    """
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if visible == [""] or environ.get("DS_ACCELERATOR") == "cpu":
        which = ("--num_accelerators", str(processes))
    elif all(name.isdecimal() for name in visible) and len(visible) >= processes:
        which = ("--include", f"localhost:{','.join(visible[:processes])}")
    else:
        meeting = ("--master-addr", LOOPBACK, "--master-port", str(port))
        words = ("--nnodes", "1", "--node-rank", "0", "--nproc-per-node", str(processes), *meeting)
        return [sys.executable, "-m", "torch.distributed.run", *words, "-m", "dinoscale", *training]
    options = (*which, "--master_port", str(port), "--log_level", "error")
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *options,
        "--module",
        "dinoscale",
        *training,
    ]
