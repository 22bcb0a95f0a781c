"""The golden trajectory over two hosts, under every launcher that can start it."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.test_trajectory import FOLDER, require_reference
from tests.multinode.cluster import INTERFACE, Cluster, Done

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

RUNS = [{"stage": 2, "accumulation": 1}, {"stage": 3, "accumulation": 1}]
LAUNCH_S = 280.0  # of a busy machine; an idle one needs 20


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """A module and its arguments: follows the trajectory and leaves its results in `tmp_path`."""
    arguments: dict[str, Any] = {"folder": str(FOLDER), "runs": RUNS}
    torch.save(arguments, tmp_path / "arguments.pt")
    return ["tests.harness", "tests.golden.test_trajectory:follow_trajectory", str(tmp_path)]


def _require_reference(folder: Path, *ended: Done) -> None:
    for done in ended:
        assert done.code == 0, done.said[-6000:]
    results = [torch.load(folder / f"result_{r}.pt", weights_only=True) for r in range(2)]
    assert not (folder / "result_2.pt").exists()
    require_reference(results, RUNS)


def test_deepspeed_over_pdsh_follows_the_reference(
    cluster: Cluster, tmp_path: Path, program: list[str]
) -> None:
    """On hosts as Debian installs them, where a host's own name means an address of itself."""
    variables = cluster.folder / "home" / ".deepspeed_env"
    variables.write_text(f"DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME={INTERFACE}\n")
    words = ["deepspeed", f"--hostfile={cluster.hostfile()}", "--no_local_rank", "--module"]
    with contextlib.ExitStack() as stack:
        for host in cluster.hosts:
            own = tmp_path / f"hosts.{host.name}"
            known = (cluster.folder / "hosts").read_text()
            own.write_text(f"127.0.1.1 {host.name}\n{known}")
            stack.enter_context(host.put(own, over=Path("/etc/hosts")))
        stack.callback(variables.unlink)
        done = cluster.hosts[0].run([*words, *program], timeout_s=LAUNCH_S)
    _require_reference(tmp_path, done)
    assert not cluster.left_behind()


def test_deepspeed_over_openmpi_follows_the_reference(
    cluster: Cluster, tmp_path: Path, program: list[str]
) -> None:
    meet = f"-x MASTER_ADDR={cluster.hosts[0].address} -x MASTER_PORT=29500"
    words = ["deepspeed", f"--hostfile={cluster.hostfile()}", "--launcher=openmpi"]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = cluster.hosts[0].run(
        [*words, f"--launcher_args={meet}", "--module", *program], timeout_s=LAUNCH_S, **as_root
    )
    _require_reference(tmp_path, done)
    assert not cluster.left_behind()


def test_deepspeed_on_each_host_without_ssh_follows_the_reference(
    cluster: Cluster, tmp_path: Path, program: list[str]
) -> None:
    address = cluster.hosts[0].address
    launcher = ["deepspeed", f"--hostfile={cluster.hostfile()}", f"--master_addr={address}"]
    started = [
        host.start(
            [*launcher, "--no_ssh", f"--node_rank={rank}", "--no_local_rank", "--module", *program]
        )
        for rank, host in enumerate(cluster.hosts)
    ]
    _require_reference(tmp_path, *(each.wait(timeout_s=LAUNCH_S) for each in started))
    assert not cluster.left_behind()


def test_torchrun_with_a_rendezvous_follows_the_reference(
    cluster: Cluster, tmp_path: Path, program: list[str]
) -> None:
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={cluster.hosts[0].name}:29400"]
    words = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=golden", *meet, "-m"]
    started = [host.start([*words, *program]) for host in cluster.hosts]
    _require_reference(tmp_path, *(each.wait(timeout_s=LAUNCH_S) for each in started))
    assert not cluster.left_behind()
