"""A hanging rank ends the job in time, named with what it was doing; no process is left behind.

All runs are started at once, since they wait most of the time.
"""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.run_processes import RunProcesses, gone, steps_logged, write_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

# Without a fault, nothing but an image that sleeps keeps such a run from moving on for more than
# 0.2 s of one core, its start included; where nine processes share a core, as many as these are on
# two, that was 1.2 s. So a machine several times slower still takes its steps within these limits.
ALLOWED_S = 10.0
SHORT_S = 8.0  # where something else is to take longer


def _grows(path: Path) -> None:
    """A file that a slow storage takes 12 s for."""
    with path.open("wb") as file:
        for _ in range(12):
            time.sleep(1)
            file.write(b"piece")
            file.flush()


def _hangs(_path: Path) -> None:
    time.sleep(1000)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunProcesses]]:
    """A run for each test, with the fault that it is named for."""

    def config(name: str, *, hang_timeout_s: float, stage: int = 2, **eval_: object) -> Path:
        folder = tmp_path_factory.mktemp(name)
        limit = {"hang_timeout_s": hang_timeout_s}
        return write_config(folder, stage=stage, epochs=1000, train=limit, eval=eval_)

    labelled = "synthetic:shapes?images={}&size=16"
    sets = {"train": labelled.format(240), "test": labelled.format(20)}
    one_step = "train.stop_after_steps=1"
    started = {
        "frozen_1": RunProcesses(config("frozen_1", hang_timeout_s=ALLOWED_S)),
        "frozen_0": RunProcesses(config("frozen_0", hang_timeout_s=ALLOWED_S)),
        "dead": RunProcesses(config("dead", hang_timeout_s=300.0, stage=3)),
        "stuck": RunProcesses(config("stuck", hang_timeout_s=ALLOWED_S), stuck_reader=1),
        "evaluates": RunProcesses(  # 12 s for the first set; the limit is 8 batches of 10 images
            config("evaluates", hang_timeout_s=SHORT_S, **sets, batch_size=10, crop=16, resize=16),
            one_step,
            slow_images_s=0.1,
        ),
        "writes": RunProcesses(
            config("writes", hang_timeout_s=SHORT_S), one_step, before_save=_grows
        ),
        "hangs": RunProcesses(
            config("hangs", hang_timeout_s=SHORT_S), one_step, before_save=_hangs
        ),
    }
    try:
        for name, number, rank in (
            ("frozen_1", signal.SIGSTOP, 1),
            ("frozen_0", signal.SIGSTOP, 0),
            ("dead", signal.SIGKILL, 1),
        ):
            run = started[name]
            assert run.wait_until(lambda: steps_logged(run.run_dir) >= 3), run.said()  # noqa: B023
            run.send(number, ranks=[rank])
        yield started
    finally:
        for run in started.values():
            run.send(signal.SIGKILL)


@pytest.mark.parametrize(
    ("frozen", "says"),
    [
        (1, "rank 1 (host-1) does not answer"),
        (0, "rank 0 (host-0), where the ranks meet, does not"),
    ],
)
def test_frozen_rank_is_named_in_time(
    runs: dict[str, RunProcesses], frozen: int, says: str
) -> None:
    run = runs[f"frozen_{frozen}"]
    pids = run.pids()
    other = run.ranks[1 - frozen]
    other.wait(ALLOWED_S + 100)
    assert other.poll() == 1, run.said()
    run.send(signal.SIGKILL, ranks=[frozen])  # as every launcher does when a rank ends
    run.end()
    assert gone(pids)
    said = run.outputs[1 - frozen].read_text()
    assert says in said
    idle = re.search(r"has made no progress for (\d+) s", said)
    assert idle
    assert float(idle[1]) >= ALLOWED_S  # looked at twice a second, later on a busy machine
    assert "train.hang_timeout_s" in said
    assert "Traceback" not in said


def test_rank_whose_images_do_not_come_is_named(runs: dict[str, RunProcesses]) -> None:
    run = runs["stuck"]
    codes = run.end(timeout_s=200)
    assert codes == [1, 1], run.said()
    for output in run.outputs:
        assert (
            "rank 1 (host-1) is behind the others, waiting for the images of step 3"
            in output.read_text()
        )


def test_dead_rank_is_named_with_what_it_did(runs: dict[str, RunProcesses]) -> None:
    run = runs["dead"]
    assert run.end(timeout_s=200) == [1, -signal.SIGKILL]  # seen each second, not after a hang
    said = run.outputs[0].read_text()
    assert "rank 0 lost contact with another rank" in said
    assert "rank 1 (host-1) is gone (last seen" in said
    assert "Traceback" not in said
    kept = (run.run_dir / "logs" / "rank_00000.log").read_text()
    assert "rank 0 of 2 on host-0" in kept
    assert "rank 1 (host-1) is gone (last seen" in kept


def test_long_evaluation_is_no_hang(runs: dict[str, RunProcesses]) -> None:
    run = runs["evaluates"]
    assert run.end(timeout_s=200) == [0, 0], run.said()
    assert "knn_top1" in (run.run_dir / "metrics.jsonl").read_text()


def test_long_write_of_one_rank_is_no_hang(runs: dict[str, RunProcesses]) -> None:
    run = runs["writes"]
    assert run.end(timeout_s=200) == [0, 0], run.said()


def test_hanging_write_is_named(runs: dict[str, RunProcesses]) -> None:
    run = runs["hangs"]
    assert run.end(timeout_s=200) == [1, 1], run.said()
    for output in run.outputs:
        said = output.read_text()
        assert "rank 1 (host-1) is behind the others, writing the checkpoint of step 1" in said
