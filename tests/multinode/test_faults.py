"""What goes wrong between hosts ends in time, says which host it is, and leaves no process."""

import contextlib
import json
import re
import signal
import time
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

from dinoscale.runtime.watchdog import collectives_timeout_s
from tests.faults.run_processes import newest_step, steps_logged, write_config
from tests.forked import run_module
from tests.multinode.cluster import Cluster, Done, Program

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

HANG_S = 40.0  # of a cut link; a start on a busy machine takes as long without a step
START_S = 240.0  # of a busy machine; an idle one needs 15
# The longest that a watchdog takes, ssh's patience (40) at the same time; processes that end.
END_S = collectives_timeout_s(HANG_S) + 60.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run over two hosts that does not end by itself."""
    return write_config(tmp_path, stage=2, epochs=1000)


def _launch(cluster: Cluster, config: Path, *arguments: str) -> Program:
    words = ["python", "-m", "dinoscale", "launch", str(config)]
    return cluster.hosts[0].start([*words, f"--hostfile={cluster.hostfile()}", *arguments])


def _trains(program: Program, run_dir: Path) -> bool:
    """Wait for some steps; false if the program ends before."""
    end = time.monotonic() + START_S
    while steps_logged(run_dir) < 4:
        if not program.running():
            return False
        assert time.monotonic() < end, program.said()[-4000:]
        time.sleep(0.05)
    return True


def test_cut_link_ends_the_job_on_both_hosts_and_names_the_other(
    cluster: Cluster, config: Path
) -> None:
    program = _launch(cluster, config, f"train.hang_timeout_s={HANG_S}")
    assert _trains(program, config.parent / "run"), program.said()
    cluster.hosts[1].plug(connected=False)
    begin = time.monotonic()
    done = program.wait(timeout_s=END_S)
    assert done.code != 0
    assert "node2" in _reason(done)
    assert not cluster.left_behind(timeout_s=END_S - (time.monotonic() - begin))


def test_host_whose_processes_die_is_named_and_one_process_goes_on_from_the_checkpoint(
    cluster: Cluster, config: Path
) -> None:
    run_dir = config.parent / "run"
    program = _launch(cluster, config)
    assert _trains(program, run_dir), program.said()
    assert re.search(r"node node2: rank 1 on .*, started by deepspeed", program.said())
    cluster.hosts[1].kill_all()
    done = program.wait(timeout_s=END_S)
    assert done.code != 0
    assert "node2" in _reason(done)
    assert not cluster.left_behind()
    logs = [run_dir / "logs" / f"rank_{rank:05d}.log" for rank in range(2)]
    assert [log.read_text().count(f"on node{r}") for r, log in enumerate(logs, 1)] == [1, 1]
    saved = newest_step(run_dir)
    alone = (f"train.stop_after_steps={saved + 6}", "train.micro_batch_size=8")
    again = run_module("dinoscale", "train", config, *alone, timeout_s=START_S)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "resuming from" in again.stderr
    assert newest_step(run_dir) == saved + 6 >= 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_launcher_that_is_told_to_end_leaves_no_process_on_any_host(
    cluster: Cluster, config: Path, number: signal.Signals
) -> None:
    program = _launch(cluster, config)
    assert _trains(program, config.parent / "run"), program.said()
    program.send(number)
    program.wait(timeout_s=END_S)
    assert not cluster.left_behind(timeout_s=END_S)


def _reason(done: Done) -> str:
    """The lines that say why; the rest names every host anyway."""
    lines = [line for line in done.said.splitlines() if "error: " in line]
    assert lines, done.said[-4000:]
    return "\n".join(line.partition("error: ")[2] for line in lines)


def _refused(cluster: Cluster, config: Path) -> list[tuple[str, str]]:
    """Host and text of all that the look at the hosts before a start finds; nothing may start."""
    done = _launch(cluster, config, "--check").wait(timeout_s=START_S)
    assert done.code == 2, done.said[-4000:]
    assert "Traceback" not in done.said
    (line,) = (line for line in done.said.splitlines() if line.startswith("{"))
    problems = [entry for entry in json.loads(line)["checks"] if entry["verdict"] == "problem"]
    assert not list((config.parent / "run").glob("*")), "something was started"
    assert not cluster.left_behind()
    return [(entry["name"], entry["text"]) for entry in problems]


def test_host_out_of_reach_is_refused_by_name(cluster: Cluster, config: Path) -> None:
    cluster.hosts[1].plug(connected=False)
    ((host, text),) = _refused(cluster, config)
    assert host == "node2"
    assert "cannot be reached by ssh" in text


def test_host_with_another_version_clock_and_run_directory_is_refused_for_each(
    cluster: Cluster, config: Path
) -> None:
    """The kernel has one clock for all namespaces, so that of node2's Python is set instead."""
    everywhere = cluster.folder / "home" / "sitecustomize.py"
    ahead, run_dir, own = (config.parent / name for name in ("ahead.py", "run", "own"))
    ahead.write_text("import time\nreal = time.time\ntime.time = lambda: real() + 90\n")
    run_dir.mkdir()
    own.mkdir()
    with contextlib.ExitStack() as odd:
        everywhere.write_text("")
        odd.callback(everywhere.unlink)
        odd.enter_context(cluster.hosts[1].put(ahead, over=everywhere))
        odd.enter_context(_other_version(cluster, config))
        odd.enter_context(cluster.hosts[1].put(own, over=run_dir))
        hosts, (version, clock, shared) = zip(*_refused(cluster, config), strict=True)
    assert hosts == ("node2",) * 3
    assert version.startswith("deepspeed is 0.18.0 there, ")
    assert re.match(r"its clock is .* ahead of this machine's", clock)
    assert "is not shared" in shared


def test_training_refuses_another_version_on_one_host(cluster: Cluster, config: Path) -> None:
    """Ranks that start as srun would, without `dinoscale launch`; both end by themselves."""
    meet = {"MASTER_ADDR": cluster.hosts[0].address, "MASTER_PORT": "29500", "WORLD_SIZE": "2"}
    words = ["python", "-m", "dinoscale", "train", str(config)]
    with _other_version(cluster, config):
        ranks = [
            host.start(words, RANK=str(rank), LOCAL_RANK="0", **meet)
            for rank, host in enumerate(cluster.hosts)
        ]
        ended = [rank.wait(timeout_s=START_S) for rank in ranks]
    assert not steps_logged(config.parent / "run")
    assert not cluster.left_behind()
    for done in ended:
        assert done.code == 2, done.said[-4000:]
        assert "0.18.0 on rank 1 (node2)" in _reason(done)


@contextlib.contextmanager
def _other_version(cluster: Cluster, config: Path) -> Iterator[None]:
    """Another deepspeed on node2, as far as its metadata tell."""
    deepspeed = distribution("deepspeed")
    site = Path(str(deepspeed.locate_file("")))
    names = ("METADATA", "PKG-INFO")  # of a wheel, and where pip installs without one
    (ours,) = (path for name in names for path in site.glob(f"deepspeed-*/{name}"))
    text = ours.read_text()
    assert f"\nVersion: {deepspeed.version}\n" in text
    other = config.parent / "METADATA"
    other.write_text(text.replace(f"\nVersion: {deepspeed.version}\n", "\nVersion: 0.18.0\n"))
    with cluster.hosts[1].put(other, over=ours):
        yield
