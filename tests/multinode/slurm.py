"""A Slurm of two nodes on the hosts of cluster.py: slurmctld on the first, slurmd on all.

Its daemons trust each other without munge, since nobody else is on their network, and all their
files but the logs are in each host's own /run.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from tests.multinode.cluster import Cluster, Host, NotPermittedError

_CONFIG = """\
ClusterName=tests
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
GresTypes=gpu
KillWait=5
SlurmdParameters=config_overrides
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/run/slurmd
StateSaveLocation=/run/slurmctld
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={name} NodeAddr={address} CPUs=2 RealMemory=1000 Gres=gpu:1 State=UNKNOWN"
_SETTINGS = Path("/etc/slurm")


@contextlib.contextmanager
def slurm_on(cluster: Cluster) -> Iterator[Host]:
    """Run Slurm; the host from which jobs are submitted.

    Raises:
        NotPermittedError: its daemons do not start here.
    """
    first, folder = cluster.hosts[0], cluster.folder / "slurm"
    folder.mkdir(exist_ok=True)
    nodes = [_NODE.format(name=host.name, address=host.address) for host in cluster.hosts]
    text = _CONFIG.format(first=first.name, folder=folder, nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # the scripts ask for GPUs
    with contextlib.ExitStack() as stack:
        for host in cluster.hosts:
            stack.enter_context(host.put(folder, over=_SETTINGS))
            host.run(["rm", "-rf", "/run/slurmctld", "/run/slurmd"])  # jobs of an earlier Slurm
        first.start(["slurmctld", "-D", "-i"])
        for host in cluster.hosts:
            host.start(["slurmd", "-D", "-N", host.name])
        _wait_for_nodes(cluster)
        yield first
        cluster.clear()  # before the settings go


def _wait_for_nodes(cluster: Cluster) -> None:
    end = time.monotonic() + 200
    while time.monotonic() < end:
        done = cluster.hosts[0].run(["sinfo", "--noheader", "--Node", "--format=%t"])
        if done.said.split() == ["idle"] * len(cluster.hosts):
            return
        time.sleep(0.5)
    logs = [path.read_text()[-500:] for path in (cluster.folder / "slurm").glob("*.log")]
    raise NotPermittedError("\n".join(["no Slurm:", done.said, *logs]))
