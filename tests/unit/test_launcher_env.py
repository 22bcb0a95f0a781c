"""Processes read from the variables that each launcher sets according to its manual."""

import pytest

from dinoscale.errors import LaunchError
from dinoscale.runtime.distributed import require_devices
from dinoscale.runtime.launcher_env import (
    LOOPBACK,
    Process,
    first_host,
    read_process,
    rendezvous_address,
    tasks_of_node,
)

Variables = dict[str, str]

# Of the fourth process of two nodes with four each, unless a comment says otherwise.
TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "ROLE_RANK": "5", "ROLE_WORLD_SIZE": "8",
    "MASTER_ADDR": "gpu-01", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CROSS_RANK": "1",
    "CROSS_SIZE": "2", "MASTER_ADDR": "gpu-01", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu-[01-02]",
    "SLURM_JOB_NODELIST": "gpu-[01-02]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_NODE_RANK": "1", "OMPI_UNIVERSE_SIZE": "8",
}  # fmt: skip
HYDRA = {  # MPICH and Intel MPI
    "PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "7",
    "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4",
}  # fmt: skip
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip
BY_HAND = {"RANK": "5", "WORLD_SIZE": "8"}
# One task a node, which starts the processes of the node; the third of three.
SRUN_A_NODE = SRUN | {
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}  # fmt: skip
BATCH_SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
# `salloc` with use_interactive_step: a shell of one task that keeps the variables of the job.
INTERACTIVE = SRUN | {
    "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
}  # fmt: skip


def _fifth(launcher: str, *, node_rank: int | None = None) -> Process:
    return Process(5, 8, 1, 4, launcher, node_rank=node_rank)


TABLE: dict[str, tuple[Variables, Process]] = {
    "nothing": ({}, Process(0, 1, 0, 1)),
    "torchrun": (TORCHRUN, _fifth("torchrun", node_rank=1)),
    "deepspeed": (DEEPSPEED, _fifth("deepspeed", node_rank=1)),
    "srun": (SRUN, _fifth("srun", node_rank=1)),
    "Open MPI": (OPENMPI, _fifth("OpenMPI")),
    "MPICH, Intel MPI": (HYDRA, _fifth("MPICH")),
    "MVAPICH2": (MVAPICH, _fifth("MVAPICH")),
    "MVAPICH2 by mpiexec": (MVAPICH | HYDRA, _fifth("MVAPICH")),
    "by hand": (BY_HAND, Process(5, 8, 5, 8, "RANK", knows_node=False)),
    "by hand, local": (BY_HAND | {"LOCAL_RANK": "1"}, Process(5, 8, 1, 8, "RANK", False)),
    "by hand in srun": (BY_HAND | SRUN, _fifth("srun", node_rank=1)),
    "by hand in srun, a GPU each": (
        BY_HAND | SRUN | {"LOCAL_RANK": "0"},
        Process(5, 8, 0, 8, "RANK", knows_node=False),
    ),
    "srun --mpi=pmi2": (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, _fifth("srun", node_rank=1)),
    "PMI alone": ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Process(1, 2, 1, 2, "PMI", False)),
    "srun, unequal nodes": (
        SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1,3", "SLURM_NODEID": "4"},
        Process(5, 8, 1, 3, "srun", node_rank=4),
    ),
    "torchrun in srun": (TORCHRUN | SRUN_A_NODE, _fifth("torchrun", node_rank=1)),
    "torchrun in srun, a process a node, in order of arrival": (
        TORCHRUN
        | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1"}
        | {"GROUP_RANK": "0"}
        | SRUN_A_NODE,
        Process(0, 3, 0, 1, "torchrun", node_rank=0),
    ),
    "deepspeed in srun": (DEEPSPEED | SRUN_A_NODE, _fifth("deepspeed", node_rank=1)),
    "mpirun by srun": (OPENMPI | SRUN_A_NODE, _fifth("OpenMPI")),
    "mpiexec by srun": (HYDRA | SRUN_A_NODE, _fifth("MPICH")),
    "torchrun in a batch script": (TORCHRUN | BATCH_SCRIPT, _fifth("torchrun", node_rank=1)),
    "python in a batch script": (BATCH_SCRIPT, Process(0, 1, 0, 1)),
    "python in salloc": (INTERACTIVE, Process(0, 1, 0, 1, "srun", node_rank=0)),
    "deepspeed in salloc": (INTERACTIVE | DEEPSPEED, _fifth("deepspeed", node_rank=1)),
    "torchrun of one node in salloc": (
        TORCHRUN | {"RANK": "1", "WORLD_SIZE": "4", "GROUP_RANK": "0"} | INTERACTIVE,
        Process(1, 4, 1, 4, "torchrun", node_rank=0),
    ),
    "empty variables": ({"RANK": "", "SLURM_STEP_ID": ""}, Process(0, 1, 0, 1)),
}


@pytest.mark.parametrize("name", TABLE)
def test_process_has_the_rank_that_the_launcher_sets(name: str) -> None:
    environ, process = TABLE[name]
    assert read_process(environ) == process


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        (BY_HAND | {"RANK": "3"} | SRUN, r"^RANK=3 \(RANK\) contradicts SLURM_PROCID=5 \(srun\)"),
        (
            TORCHRUN | SRUN | {"SLURM_STEP_NUM_TASKS": "16"},
            r"^WORLD_SIZE=8 \(torchrun\) contradicts SLURM_STEP_NUM_TASKS=16 \(srun\).* unset",
        ),
        (OPENMPI | HYDRA | {"PMI_SIZE": "6"}, r"OMPI_COMM_WORLD_SIZE=8 .* PMI_SIZE=6 \(MPICH"),
        (MVAPICH | HYDRA | {"PMI_RANK": "6"}, r"MV2_COMM_WORLD_RANK=5 .* PMI_RANK=6"),
        # Each node's torchrun believes that it is alone: --nnodes was forgotten.
        (TORCHRUN | {"RANK": "1", "WORLD_SIZE": "4"} | SRUN_A_NODE, r"WORLD_SIZE=4 .*--nnodes"),
        # A launcher started by each of many tasks of a node.
        (TORCHRUN | SRUN | {"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, "RANK=5 .*SLURM_PROCID=1"),
        # A stray line in a login script.
        ({"RANK": "0", "WORLD_SIZE": "1"} | SRUN, "WORLD_SIZE=1 .* SLURM_STEP_NUM_TASKS=8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, r"LOCAL_RANK=4, 4 ranks .*LOCAL_WORLD_SIZE\) and WORLD"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, r"9 ranks on this node .* WORLD_SIZE=8"),
        (TORCHRUN | {"RANK": "8"}, r"torchrun: RANK=8 is not in 0\.\.7"),
        (OPENMPI | {"OMPI_COMM_WORLD_RANK": "-1"}, "OMPI_COMM_WORLD_RANK=-1 is not in"),
        (DEEPSPEED | {"CROSS_RANK": "one"}, "deepspeed: CROSS_RANK='one' is not a whole number"),
        ({"RANK": "0"}, "RANK is set but RANK or WORLD_SIZE is not"),
        ({"LOCAL_SIZE": "2"}, "LOCAL_SIZE is set but RANK or WORLD_SIZE is not"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8"}, "SLURM_STEP_TASKS_PER_NODE='8' .*NODEID=1"),
    ],
)
def test_contradiction_is_refused_with_both_names_and_values(environ: Variables, says: str) -> None:
    with pytest.raises(LaunchError, match=says) as refused:
        read_process(environ)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (TORCHRUN, ("gpu-01", 29400)),
        (SRUN, ("gpu-01", 24711)),
        (SRUN | {"MASTER_ADDR": "ib-01", "MASTER_PORT": "4000"}, ("ib-01", 4000)),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, ("gpu-01", 24711)),
        (SRUN | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, ("10.0.0.9", 24711)),
        (SRUN | {"SLURM_STEP_NODELIST": "cn[7,9]"}, ("cn7", 24711)),  # not of the whole job
        (SRUN | BY_HAND, ("gpu-01", 24711)),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, (LOOPBACK, 29500)),
        (OPENMPI | {"MASTER_ADDR": "gpu-01"}, ("gpu-01", 29500)),
    ],
)
def test_rendezvous_address(environ: Variables, place: tuple[str, int]) -> None:
    assert rendezvous_address(read_process(environ), environ) == place


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        (OPENMPI, "OpenMPI does not say where rank 0 runs.* mpirun -x MASTER_ADDR=HOST"),
        (HYDRA, "MPICH does not say .* mpiexec -genv MASTER_ADDR HOST"),
        (MVAPICH, "MVAPICH does not say .* mpirun_rsh"),
        (BY_HAND, "export MASTER_ADDR=HOST"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is no port"),
        (SRUN | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' is not a whole number"),
    ],
)
def test_unknown_address_of_rank_0_is_refused_with_the_remedy(
    environ: Variables, says: str
) -> None:
    with pytest.raises(LaunchError, match=says):
        rendezvous_address(read_process(environ), environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("node[003-007,9]", "node003"),
        ("node[9]", "node9"),
        ("a,node[1-2]", "a"),
        ("gpu-[10-12,20],login", "gpu-10"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("n[1-2].cluster.example,m", "n1.cluster.example"),
        ("[1-2]x", "1x"),
    ],
)
def test_first_host_of_a_list_of_nodes(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("text", "counts"), [("8", [8]), ("4(x2)", [4, 4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2", [1, 2])]
)
def test_tasks_of_each_node(text: str, counts: list[int]) -> None:
    assert [tasks_of_node(text, node) for node in range(len(counts))] == counts
    with pytest.raises(LaunchError, match="SLURM_STEP_TASKS_PER_NODE"):
        tasks_of_node(text, len(counts))


@pytest.mark.parametrize("text", ["", "x", "2(x)", "2(y3)", "(x2)", "2 (x2)"])
def test_garbled_tasks_per_node_are_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="SLURM_STEP_TASKS_PER_NODE"):
        tasks_of_node(text, 0)


@pytest.mark.parametrize(
    ("local_rank", "knows_node", "num_devices", "refused"),
    [
        (0, True, 0, False),  # ranks share a CPU
        (3, True, 4, False),
        (0, True, 2, True),  # on every rank of the node, so that nobody waits
        (1, False, 2, False),
        (2, False, 2, True),
    ],
)
def test_more_ranks_than_devices_are_refused_before_the_ranks_meet(
    local_rank: int, knows_node: bool, num_devices: int, refused: bool
) -> None:
    process = Process(local_rank, 4, local_rank, 4, "torchrun", knows_node)
    if not refused:
        require_devices(process, num_devices=num_devices)
        return
    with pytest.raises(LaunchError, match=rf"LOCAL_RANK={local_rank}\) but 2 accel.*; start 2"):
        require_devices(process, num_devices=num_devices)
