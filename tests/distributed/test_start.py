"""How ranks meet: who can reach them, how long they wait, how many of them can connect."""

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch.distributed as dist

from dinoscale import cli
from dinoscale.errors import ConfigError, DinoscaleError, LaunchError
from dinoscale.runtime import distributed
from dinoscale.runtime.distributed import MAX_OPEN_FILES
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.watchdog import collectives_timeout_s
from tests.forked import Forked
from tests.harness import environment_of, run_distributed
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

_LOOK = """
import json, os, resource
import torch.distributed as dist
from dinoscale.runtime import distributed
from dinoscale.engine.student import import_deepspeed
from dinoscale.runtime.launcher_env import read_process

resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
distributed.start(read_process(os.environ), timeout_s=77)
groups = import_deepspeed().utils.groups
backend = groups._get_data_parallel_group()._get_backend(dist.distributed_c10d.torch.device("cpu"))
port = f":{int(os.environ['MASTER_PORT']):04X}"
sockets = [line.split() for kind in ("tcp", "tcp6") for line in open(f"/proc/net/{kind}")]
print(json.dumps({
    "group_s": backend.options._timeout.total_seconds(),
    "nccl_s": dist.distributed_c10d._get_default_timeout("nccl").total_seconds(),
    "listens": [s[1].removesuffix(port) for s in sockets if s[1].endswith(port) and s[3] == "0A"],
    "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
}))
distributed.stop()
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a job of one process on one node looks like, that was told its node's own name."""
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    place = {
        "MASTER_ADDR": socket.gethostname(),
        "MASTER_PORT": str(free_port()),
        "CROSS_RANK": "0",
    }
    environment = os.environ | own | place | {"PYTHONPATH": str(ROOT)}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    done = subprocess.run(
        [sys.executable, "-c", _LOOK], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_groups_that_deepspeed_makes_have_our_time_out(found: dict[str, Any]) -> None:
    assert (found["group_s"], found["nccl_s"]) == (77, 77)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads the sockets from /proc")
def test_ranks_of_one_node_meet_where_no_other_machine_reaches_them(found: dict[str, Any]) -> None:
    assert found["listens"] == ["0100007F"]  # 127.0.0.1, and not all interfaces
    assert found["interface"] == "lo"


def test_limit_of_open_files_is_raised(found: dict[str, Any]) -> None:
    assert found["files"] == min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], MAX_OPEN_FILES)


@pytest.mark.parametrize("hang_timeout_s", [1.0, 1800.0])
def test_a_watchdog_ends_the_ranks_before_a_collective_gives_up(hang_timeout_s: float) -> None:
    answers_of_a_slow_store_s = 60
    assert collectives_timeout_s(hang_timeout_s) > hang_timeout_s + answers_of_a_slow_store_s


def read_late() -> str | None:
    """On every rank: rank 1 still reads in the store when rank 0 has nothing more to do."""
    from dinoscale.runtime import distributed

    if distributed.rank() == 0:
        return None
    time.sleep(1.0)
    store = distributed.KeyValueStore()
    store.set("late", "here")
    return store.get("late")


def test_no_rank_leaves_while_another_still_reads_in_the_store() -> None:
    assert run_distributed(f"{__name__}:read_late", world_size=2, timeout_s=120) == [None, "here"]


def _meet_and_end() -> None:
    """A rank that ends as if killed: nothing that it has left is taken away."""
    from dinoscale.runtime import distributed
    from dinoscale.runtime.launcher_env import read_process

    distributed.start(read_process(os.environ), timeout_s=60)
    store = distributed.KeyValueStore()
    store.set(f"here/{distributed.rank()}", "")
    store.wait_for(["here/0", "here/1"])
    distributed.gather_objects(None)
    os._exit(0)


def test_ranks_that_torchrun_starts_again_meet_anew() -> None:
    exported: Any = dist  # TCPStore is public, but not in __all__
    agents = exported.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restarts in ("00", "01"):  # only the node whose rank has failed counts it
        ranks = [
            Forked(
                _meet_and_end,
                environment=environment_of(rank, world_size=2, port=agents.port)
                | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": count},
            )
            for rank, count in enumerate(restarts)
        ]
        try:
            assert [process.wait(90) for process in ranks] == [0, 0]
        finally:
            for process in ranks:
                process.kill()


@pytest.mark.parametrize("startup_error", [ConfigError("optim.lrr: unknown key"), None])
def test_rank_whose_verdict_nobody_reads_says_why_and_ends(
    startup_error: DinoscaleError | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(distributed, "_QUIET_S", 0.0)
    monkeypatch.setattr(distributed, "_REPORT_S", 0.2)
    store: Any = dist.HashStore()  # type: ignore[attr-defined]  # as above
    if startup_error is None:
        store.set("verdict", "rank 1 (there): optim.lrr: unknown key")
    with pytest.raises(
        ConfigError if startup_error else LaunchError, match=r"optim\.lrr: unknown key"
    ):
        distributed._require_all_ready(store, Process(0, 2, 0, 2), startup_error)
    assert len(caplog.messages) == 1
    assert "optim.lrr: unknown key" in caplog.text


def test_process_with_a_startup_error_leaves_a_running_job_alone() -> None:
    store: Any = dist.HashStore()  # type: ignore[attr-defined]  # as above
    store.set("verdict", "ready")
    with pytest.raises(ConfigError):
        distributed._require_all_ready(store, Process(1, 2, 1, 2), ConfigError("a mistake"))
    assert not store.check(["num read"])


@pytest.mark.parametrize(
    ("command", "tells"), [("train", True), ("evaluate", True), ("data", False)]
)
def test_mistake_in_a_command_line_is_told_where_ranks_meet(
    command: str, tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = MagicMock()
    monkeypatch.setattr(cli, "tell_others", told)
    with pytest.raises(SystemExit):
        cli.run([command, "--optim"])
    assert told.called == tells


def test_library_that_a_benchmark_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = MagicMock()
    monkeypatch.setattr("dinoscale.cli.ranks.tell_others", told)
    monkeypatch.setitem(sys.modules, "dinoscale.planning.bench.step", None)
    with pytest.raises(ImportError):
        cli.run(["bench", "step", "vit_s16"])
    assert told.called


def _begin(failing: str, arguments: list[str], late_s: float) -> None:
    """A rank whose node differs: `failing` is what it cannot do before it meets the others."""
    import dinoscale.runtime.distributed
    import dinoscale.training.trainer
    from dinoscale.__main__ import main

    time.sleep(late_s)
    if failing == "device":
        busy = RuntimeError("CUDA error: device is busy\nFor debugging consider ...")
        dinoscale.runtime.distributed._use_device = MagicMock(side_effect=busy)
    if failing == "library":
        del dinoscale.training.trainer.train
    sys.argv = ["dinoscale", *arguments]
    main()


@pytest.mark.parametrize(
    ("failing", "differs", "says"),
    [
        ("", ["optim.lrr=1"], "optim.lrr: unknown key"),
        ("", ["--optim"], "its command line is wrong"),
        ("device", [], "cpu cannot be used: CUDA error: device is busy"),
        ("library", [], "ImportError: cannot import name 'train'"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_mistake_on_one_node_before_ranks_meet_ends_all_of_them(
    tmp_path: Path, rank: int, failing: str, differs: list[str], says: str
) -> None:
    line = ["train", "vit_s16", "data.train=synthetic:shapes?images=16", f"run_dir={tmp_path}/run"]
    ways = [("", line, 1.0), ("", line, 1.0)]  # the failing one does not find the other there
    ways[rank] = (failing, [*line, *differs], 0.0)
    port = free_port()
    ranks = [
        Forked(_begin, *way, environment=environment_of(number, world_size=2, port=port))
        for number, way in enumerate(ways)
    ]
    try:
        codes = [process.wait(120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    other = ranks[1 - rank].said()
    assert codes[1 - rank] == 2, other
    assert f"rank {rank} ({socket.gethostname()}): {says}" in other
    assert codes[rank] == (1 if failing == "library" else 2), ranks[rank].said()
    assert "Traceback" not in other
