"""A sweep goes on after anything: what was done stays done, the rest is taken up."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinoscale.cli.evaluation.evaluate import evaluation_words
from dinoscale.config.sweep.executor import ExecutorConfig
from dinoscale.errors import (
    ConfigError,
    DataError,
    DinoscaleError,
    PreemptedError,
    RunFailedError,
    UnavailableError,
)
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.design.run_key import key_of
from dinoscale.scaling.sweep import preflight, table
from dinoscale.scaling.sweep import run as run_module
from dinoscale.scaling.sweep.executors import LocalExecutor
from dinoscale.scaling.sweep.reuse import rows_of_sweep
from dinoscale.scaling.sweep.run import run_sweep
from dinoscale.scaling.sweep.run_files import Job, read_job, read_result, write_record
from dinoscale.scaling.sweep.status import read_status
from dinoscale.scaling.sweep.table import TABLE, Row, read_table
from tests.unit.sweep.tiny_sweep import METRICS, SCRIPT, do_job, planned, program

RUNS = [planned(number) for number in range(3)]
KNN = "knn --train a --test b"


class ScriptedExecutor:
    """Jobs that end at once, as told: by name of the run, one action after another."""

    retries_bad_input = False

    def __init__(self, **script: Sequence[str]) -> None:
        self.script = {name: list(actions) for name, actions in script.items()}
        self.alive: set[str] = set()  # handles of jobs that an earlier sweep has started
        self.started: list[str] = []
        self.most = 0
        self._running: list[tuple[Path, str]] = []

    def start(self, run_dir: Path) -> str:
        self.started.append(run_dir.name)
        actions = self.script.get(run_dir.name.partition("-")[0], [])
        action = actions.pop(0) if actions else "done"
        if action == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
            action = "stopped"
        how = "signal SIGKILL" if action == "killed" else f"exit {do_job(run_dir, action)}"
        self._running.append((run_dir, how))
        self.most = max(self.most, len(self._running))
        return f"job {len(self.started)}"

    def adopt(self, run_dir: Path, handle: str) -> bool:
        if handle in self.alive:
            do_job(run_dir, "done")
            self._running.append((run_dir, "exit 0"))
        return handle in self.alive

    def ended(self) -> list[tuple[Path, str]]:
        return [self._running.pop(0)] if self._running else []

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_POLL_S", 0.0)


def _run(
    out: Path,
    executor: ScriptedExecutor | None = None,
    runs: Sequence[PlannedRun] = RUNS,
    *,
    metrics: dict[str, str] = METRICS,
    retry_failed: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_executor", lambda *_: executor or ScriptedExecutor())
        return run_sweep(
            runs,
            out=out,
            metrics=metrics,
            executor=ExecutorConfig(**settings),
            retry_failed=retry_failed,
            evaluation_words=evaluation_words,
        )


def _rows(out: Path) -> dict[str, Row]:
    return {row.name.partition("-")[0]: row for row in read_table(out / TABLE)}


def _lines(out: Path) -> int:
    return len((out / TABLE).read_text().splitlines()) - 1


def test_every_run_becomes_a_row(tmp_path: Path) -> None:
    told = _run(tmp_path)
    assert (told["done"], told["failed"], told["left"]) == (3, 0, 0)
    assert told["table"] == str(tmp_path / TABLE)
    row = _rows(tmp_path)["seed1"]
    assert (row.status, row.attempts, row.seconds, row.ranks) == ("done", 1, 10.0, 1)
    assert (row.flops, row.embed_dim, row.depth, row.seed) == (256 * 10**6, 16, 1, 1)
    assert (row.metrics, row.axes) == ({"knn": 0.5, "loss": 0.5}, {"seed": 1})
    assert row.config == RUNS[1].config.model_dump(mode="json")
    assert row.lr == RUNS[1].config.optim.lr * 16 / 256


def test_finished_runs_are_not_repeated_and_new_ones_are_added(tmp_path: Path) -> None:
    _run(tmp_path, runs=RUNS[:2])
    shutil.rmtree(tmp_path / "runs" / RUNS[0].name)  # a row stays whatever becomes of its folder
    again = ScriptedExecutor()
    _run(tmp_path, again)
    assert again.started == [RUNS[2].name]
    assert _lines(tmp_path) == 3


def test_no_more_than_parallel_run_at_a_time(tmp_path: Path) -> None:
    for parallel in (1, 2):
        executor = ScriptedExecutor()
        _run(tmp_path / str(parallel), executor, parallel=parallel)
        assert executor.most == parallel


def test_failed_run_is_tried_again_and_then_reported_while_others_go_on(tmp_path: Path) -> None:
    executor = ScriptedExecutor(seed0=["failed"] * 9, seed1=["failed", "done"])
    with pytest.raises(RunFailedError, match=r"1 of 3 runs failed.*\n.*failed as told.*job\.log"):
        _run(tmp_path, executor, retries=2)
    assert [executor.started.count(run.name) for run in RUNS] == [3, 2, 1]
    rows = _rows(tmp_path)
    assert [(row.status, row.attempts) for row in (rows["seed0"], rows["seed1"])] == [
        ("failed", 3),
        ("done", 2),
    ]
    assert rows["seed0"].error == "failed as told"
    assert rows["seed1"].seconds == 20.0  # of both attempts
    again = ScriptedExecutor()
    with pytest.raises(RunFailedError, match=RUNS[0].name):
        _run(tmp_path, again)
    assert not again.started


def test_retry_failed_gives_new_attempts(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError):
        _run(tmp_path, ScriptedExecutor(seed0=["failed"] * 9), retries=1)
    executor = ScriptedExecutor(seed0=["failed", "done"])
    _run(tmp_path, executor, retry_failed=True, retries=1)
    assert executor.started == [RUNS[0].name] * 2
    row = _rows(tmp_path)["seed0"]
    assert (row.status, row.attempts, row.error) == ("done", 4, "")


@pytest.mark.parametrize(("elsewhere", "starts"), [(False, 1), (True, 2)])
def test_bad_input_is_tried_again_only_where_another_machine_may_have_it(
    tmp_path: Path, elsewhere: bool, starts: int
) -> None:
    executor = ScriptedExecutor(seed0=["bad input"] * 2)
    executor.retries_bad_input = elsewhere
    with pytest.raises(RunFailedError):
        _run(tmp_path, executor, RUNS[:1], retries=1)
    assert len(executor.started) == starts


def test_run_that_stops_by_itself_is_no_failure(tmp_path: Path) -> None:
    executor = ScriptedExecutor(seed0=["stopped"] * 3)
    _run(tmp_path, executor, RUNS[:1], retries=0)
    assert len(executor.started) == 4
    assert _rows(tmp_path)["seed0"].attempts == 1


def test_killed_job_is_a_failure_that_says_how(tmp_path: Path) -> None:
    def start(self: ScriptedExecutor, run_dir: Path) -> str:
        (run_dir / "job.log").write_text("step 3\n")
        self._running.append((run_dir, "signal SIGKILL"))
        return "job"

    executor = type("Killed", (ScriptedExecutor,), {"start": start})()
    with pytest.raises(
        RunFailedError, match="its job ended with signal SIGKILL; last output: step 3"
    ):
        _run(tmp_path, executor, RUNS[:1], retries=1)
    assert _rows(tmp_path)["seed0"].attempts == 2


def test_ending_of_an_earlier_start_does_not_decide(tmp_path: Path) -> None:
    folder = _leave(tmp_path, RUNS[0], "stopped", handle="")

    def dies_at_import(self: ScriptedExecutor, run_dir: Path) -> str:
        self.started.append(run_dir.name)
        assert len(self.started) < 9
        with (run_dir / "job.log").open("a") as log:
            log.write("ModuleNotFoundError: No module named 'x'\n")
        self._running.append((run_dir, "exit code 1"))
        return "job"

    (folder / "job.log").write_text("error: asked to stop\n")
    executor = type("Dead", (ScriptedExecutor,), {"start": dies_at_import})()
    with pytest.raises(RunFailedError, match="exit code 1; last output: ModuleNotFoundError"):
        _run(tmp_path, executor, RUNS[:1], retries=1)
    assert len(executor.started) == 2


def test_stop_signal_leaves_no_row_and_the_next_start_goes_on(tmp_path: Path) -> None:
    executor = ScriptedExecutor(seed1=["signal"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match=r"SIGTERM.*1 of 3 .*the same command resumes"):
        _run(tmp_path, executor)
    assert signal.getsignal(signal.SIGTERM) == before
    assert list(_rows(tmp_path)) == ["seed0"]
    _run(tmp_path)
    assert [row.attempts for row in _rows(tmp_path).values()] == [1, 1, 1]


def _leave(out: Path, run: PlannedRun, action: str, handle: str = "job 1") -> Path:
    """A folder as a sweep that was killed has left it."""
    folder = out / "runs" / run.name
    folder.mkdir(parents=True)
    write_record(folder, Job(run.key, metrics=METRICS, handle=handle))
    if action:
        do_job(folder, action)
    return folder


def test_results_that_came_while_no_sweep_ran_are_collected(tmp_path: Path) -> None:
    for run, action in zip(RUNS, ("done", "failed", ""), strict=True):
        _leave(tmp_path, run, action)
    executor = ScriptedExecutor()
    _run(tmp_path, executor)
    assert executor.started == [RUNS[1].name, RUNS[2].name]
    assert [row.attempts for row in _rows(tmp_path).values()] == [1, 2, 1]


def test_job_that_still_runs_is_not_started_twice(tmp_path: Path) -> None:
    _leave(tmp_path, RUNS[0], "", handle="job 7")
    executor = ScriptedExecutor()
    executor.alive = {"job 7"}
    _run(tmp_path, executor, RUNS[:1])
    assert not executor.started
    assert _rows(tmp_path)["seed0"].status == "done"


@pytest.mark.parametrize("damage", ["folder", "result.json", "job.json"])
def test_run_without_its_files_begins_anew(tmp_path: Path, damage: str) -> None:
    folder = _leave(tmp_path, RUNS[0], "done")
    if damage == "folder":
        shutil.rmtree(folder)
    else:
        os.truncate(folder / damage, (folder / damage).stat().st_size // 2)
    executor = ScriptedExecutor()
    _run(tmp_path, executor, RUNS[:1])
    assert executor.started == [RUNS[0].name]
    assert _rows(tmp_path)["seed0"].status == "done"


def test_run_that_has_begun_keeps_its_folder_when_an_axis_renames_it(tmp_path: Path) -> None:
    old = replace(RUNS[0], name=f"seed0-{RUNS[0].key[:8]}")
    new = replace(old, name=f"seed0-wide-{RUNS[0].key[:8]}")
    _run(tmp_path, runs=[old])
    _run(tmp_path, runs=[new], metrics={**METRICS, "other": KNN})
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [old.name]
    assert [row.name for row in read_table(tmp_path / TABLE)] == [new.name]
    assert read_status([new], out=tmp_path)["runs"][0]["state"] == "done"


def test_folder_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    folder = _leave(tmp_path, RUNS[0], "done")
    write_record(folder, Job("f" * 16))
    with pytest.raises(ConfigError, match=rf"{RUNS[0].name}: holds another run, f{{16}}"):
        _run(tmp_path)
    assert not (tmp_path / TABLE).exists()


def test_new_metric_is_measured_and_nothing_trained(tmp_path: Path) -> None:
    _run(tmp_path, runs=RUNS[:2])
    folder = tmp_path / "runs" / RUNS[0].name
    shutil.rmtree(tmp_path / "runs" / RUNS[1].name)  # what is gone is not trained for a metric
    executor = ScriptedExecutor()
    _run(tmp_path, executor, RUNS[:2], metrics={"loss": "online", "other": KNN})
    assert executor.started == [RUNS[0].name]
    assert read_result(folder, RUNS[0].key).lines == {"loss": "online", "other": KNN}
    job = read_job(folder)
    assert job is not None
    assert job.commands == {"other": ["evaluate", "knn", str(folder), *KNN.split()[1:]]}
    assert _lines(tmp_path) == 3
    assert _rows(tmp_path)["seed0"].metrics == {"loss": 0.5, "other": 0.5, "knn": 0.5}
    assert _rows(tmp_path)["seed1"].metrics == {"loss": 0.5, "knn": 0.5}


def test_metric_with_a_changed_line_is_measured_again(tmp_path: Path) -> None:
    _run(tmp_path, runs=RUNS[:1], metrics={"other": KNN})
    for line, starts in ((KNN, 0), (f"{KNN} --k 5", 1)):
        executor = ScriptedExecutor()
        _run(tmp_path, executor, RUNS[:1], metrics={"other": line})
        assert len(executor.started) == starts


def test_a_row_says_by_what_its_metrics_were_measured(tmp_path: Path) -> None:
    _run(tmp_path, runs=RUNS[:1], metrics={"other": KNN})
    assert _rows(tmp_path)["seed0"].lines == {"other": KNN}
    shutil.rmtree(tmp_path / "runs" / RUNS[0].name)
    executor = ScriptedExecutor()
    _run(tmp_path, executor, RUNS[:1], metrics={"other": f"{KNN} --k 5"})
    assert not executor.started  # its weights are gone
    rows, (note,) = rows_of_sweep(
        list(_rows(tmp_path).values()), RUNS[:1], {"other": f"{KNN} --k 5"}
    )
    assert rows[0].metrics == {}
    assert "measured by 'knn --train a --test b', not by" in note


def test_planned_work_is_logged_before_anything_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _run(tmp_path, runs=RUNS[:1])
    other = replace(
        RUNS[1], key="f" * 16, name="old", config=planned(1, "optim.clip_grad=0.5").config
    )
    _run(tmp_path, runs=[other])
    with caplog.at_level("INFO"):
        _run(tmp_path, runs=[RUNS[0], RUNS[1]], metrics={**METRICS, "other": KNN})
    said = [record.message for record in caplog.records]
    assert said[0] == "2 runs: 1 new"
    assert said[1] == f"{RUNS[0].name}: measure other: new"
    assert said[2].startswith("1 run (old) of the table left out: the file has no such run")
    assert "1 in optim.clip_grad" in said[2]
    assert "started" in said[3]


def test_a_run_of_an_earlier_version_keeps_its_key(tmp_path: Path) -> None:
    config = RUNS[0].config
    old = replace(RUNS[0], key="a" * 16)
    _run(tmp_path, runs=[old])
    now = replace(RUNS[0], key=key_of(config), name="seed0-again")
    executor = ScriptedExecutor()
    _run(tmp_path, executor, [now])
    assert not executor.started
    assert read_status([now], out=tmp_path)["runs"][0]["state"] == "done"


def test_metric_that_fails_costs_neither_the_run_nor_the_others(tmp_path: Path) -> None:
    executor = ScriptedExecutor(seed0=["without other"] * 2)
    metrics = {"loss": "online", "other": KNN}
    with pytest.raises(RunFailedError, match="metric other: no data"):
        _run(tmp_path, executor, RUNS[:1], metrics=metrics, retries=1)
    row = _rows(tmp_path)["seed0"]
    assert (row.status, row.metrics) == ("done", {"loss": 0.5, "other": None})
    assert row.error == "metric other: no data"
    _run(tmp_path, runs=RUNS[:1], metrics=metrics, retry_failed=True)
    row = _rows(tmp_path)["seed0"]
    assert (row.metrics["other"], row.attempts, row.error) == (0.5, 3, "")


def test_full_disk_loses_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(table.os, "fsync", full)
        with pytest.raises(DataError, match=r"results\.csv: cannot be written \(No space left"):
            _run(tmp_path)
    executor = ScriptedExecutor()
    _run(tmp_path, executor)
    assert RUNS[0].name not in executor.started
    assert len(_rows(tmp_path)) == 3


def test_second_process_is_refused_at_once(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from dinoscale.runtime.locks import try_lock"
    code += f"; lock = try_lock(Path({str(tmp_path / '.lock')!r})); print(flush=True)"
    code += "; sys.stdin.read()"
    command = [sys.executable, "-c", code]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()
    try:
        with pytest.raises(DinoscaleError, match="another process runs the sweep"):
            _run(tmp_path)  # while the first is alive, so without waiting for it
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert _run(tmp_path)["done"] == 3


@pytest.mark.parametrize(
    ("metrics", "settings", "overrides", "said"),
    [
        ({"a": "knn --train x"}, {}, [], "metrics.a: .*required: --test"),
        ({"a": "knn --train x --test y --out z"}, {}, [], "metrics.a: .*--out"),
        ({"a": "nothing"}, {}, [], "metrics.a: .*invalid choice"),
        ({"a": "pca --images x"}, {}, [], "metrics.a: "),
        ({}, {"nodes": 2}, [], "2 nodes need executor.kind slurm"),
        ({}, {"kind": "slurm"}, [], "slurm needs sbatch"),
        ({}, {}, ["data.train=/nowhere"], "run seed0-0000: .*/nowhere"),
        ({}, {}, ["data.train=null"], "data.train: give the images"),
    ],
)
def test_what_cannot_work_starts_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metrics: dict[str, str],
    settings: dict[str, Any],
    overrides: list[str],
    said: str,
) -> None:
    monkeypatch.setenv("PATH", "")
    executor = ScriptedExecutor()
    with pytest.raises(DinoscaleError, match=said):
        _run(tmp_path, executor, [planned(0, *overrides)], metrics=metrics, **settings)
    assert not executor.started


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DinoscaleError, match=r"out: cannot write to .*file/sweep"):
        _run(tmp_path / "file" / "sweep")


def test_images_out_of_reach_are_not_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(_: object) -> None:
        raise UnavailableError("cannot read /shared: Stale file handle")

    monkeypatch.setattr(preflight, "open_images", out_of_reach)
    with pytest.raises(UnavailableError, match=r"run seed0-0000: cannot read /shared"):
        preflight.require_data([planned(0)], elsewhere=False)


def test_runs_that_need_more_gpus_than_there_are_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    fits = ExecutorConfig(parallel=2, processes=2)
    assert preflight.require_machine(fits) == ["3", "5", "6", "7"]
    with pytest.raises(ConfigError, match=r"3 runs of 2 processes need 6 GPUs.*has 4"):
        preflight.require_machine(ExecutorConfig(parallel=3, processes=2))


def test_jobs_share_cores_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinoscale.scaling.sweep.executors.available_cores", lambda: 13)
    code = "import os, sys; from pathlib import Path; sys.stdin.read(); names = ["
    code += "'OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES', 'DS_ACCELERATOR']; Path(sys.argv[1], 'own')"
    code += ".write_text(' '.join(os.environ.get(name, '-') for name in names))"
    told = []
    for number, gpus in enumerate((["3", "5", "6", "7"], [])):
        executor = LocalExecutor(
            parallel=2, processes=2, gpus=gpus, program=[sys.executable, "-c", code]
        )
        folders = [tmp_path / f"{number}{place}" for place in range(2)]
        for folder in folders:
            folder.mkdir()
            executor.start(folder)
        assert not executor.ended()
        executor.close()
        assert sorted(executor.ended()) == [(folder, "exit code 0") for folder in folders]
        told += [(folder / "own").read_text() for folder in folders]
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES", "-")
    assert told[0].startswith("3 3,5 ")
    assert told[1].startswith("3 6,7 ")
    assert told[2:] == [f"3 {inherited} cpu"] * 2


def _run_local(out: Path) -> None:
    executor = LocalExecutor(parallel=2, processes=1, gpus=[], program=program())
    try:
        _run(out, executor, parallel=2)  # type: ignore[arg-type]
    except PreemptedError as error:
        sys.exit(error.exit_code)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_jobs_end_with_the_sweep_however_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    script = {RUNS[0].name: ["wait", "done"], RUNS[1].name: ["wait", "done"]}
    (tmp_path / SCRIPT).write_text(json.dumps(script))
    sweep = multiprocessing.get_context("fork").Process(target=_run_local, args=(tmp_path,))
    sweep.start()
    assert sweep.pid is not None
    folders = [tmp_path / "runs" / run.name for run in RUNS[:2]]
    end = time.monotonic() + 200
    while not all((folder / "metrics.jsonl").exists() for folder in folders):
        assert time.monotonic() < end
        assert sweep.is_alive()
        time.sleep(0.02)
    os.kill(sweep.pid, number)
    sweep.join(200)
    assert sweep.exitcode == (-number if number == signal.SIGKILL else PreemptedError.exit_code)
    for run, folder in zip(RUNS, folders, strict=False):
        while read_result(folder, run.key).ending != "stopped":
            assert time.monotonic() < end
            time.sleep(0.02)
    assert not (tmp_path / TABLE).exists()
    _run_local(tmp_path)
    assert [row.attempts for row in _rows(tmp_path).values()] == [1, 1, 1]
