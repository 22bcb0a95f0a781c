"""The job of a run: what it starts, what it makes of an end, and what it measures."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinoscale.errors import RunFailedError
from dinoscale.runtime.fingerprint import Fingerprint
from dinoscale.scaling.sweep import job as job_module
from dinoscale.scaling.sweep import measured_on
from dinoscale.scaling.sweep.job import JobAttempt, headline_error, training_command
from dinoscale.scaling.sweep.run_files import Job, Result, read_result, write_record
from dinoscale.scaling.sweep.run_logs import last_error, last_step, online_metric, read_points, thin
from dinoscale.scaling.sweep.table_row import row_of
from tests.unit.sweep.tiny_sweep import planned

KEY = "a" * 16


def _attempt(folder: Path, job: Job, code: str, monkeypatch: pytest.MonkeyPatch) -> JobAttempt:
    """A job whose training is a line of Python."""
    write_record(folder, job)
    command = [sys.executable, "-c", f"import sys, time; {code}"]
    monkeypatch.setattr(job_module, "training_command", lambda *_: command)
    return JobAttempt(folder)


def _say(**values: object) -> str:
    """A training that logs a step and saves it."""
    line = json.dumps({"step": 4, "images": 64, **values})
    step = "pathlib.Path(folder, 'checkpoints', 'step_00000004').mkdir(parents=True)"
    return f"pathlib.Path(folder, 'metrics.jsonl').write_text({line!r}); {step}"


def _training(folder: Path, **values: object) -> str:
    return f"import pathlib; folder = {str(folder)!r}; {_say(**values)}"


def test_training_is_measured_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(KEY, metrics={"loss": "online", "knn": "online"})
    attempt = _attempt(tmp_path, job, _training(tmp_path, loss=2.5, knn_top1=75.0), monkeypatch)
    assert attempt.run() == "done"
    result = read_result(tmp_path, KEY)
    assert result.metrics == {"loss": 2.5, "knn": 0.25}
    assert result.curves == [{"step": 4, "images": 64, "loss": 2.5, "knn": 0.25}]
    assert (result.trained, result.lines) == (True, job.metrics)
    assert 0 < result.seconds < 300
    assert "torch" in result.versions
    _log(tmp_path, {"step": 4, "loss": 9.0, "knn_top1": 0.0})
    again = _attempt(tmp_path, job, "sys.exit(1)", monkeypatch)
    assert again.run() == "done"
    assert read_result(tmp_path, KEY) == result


def test_metric_of_images_that_were_replaced_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"1")
    words = ["evaluate", "knn", str(tmp_path), "--test", str(images)]
    job = Job(KEY, metrics={"own": "knn --test images"}, commands={"own": words})
    values = iter([0.25, 0.75])
    monkeypatch.setattr(JobAttempt, "_value", lambda *_: next(values))
    assert _attempt(tmp_path, job, _training(tmp_path), monkeypatch).run() == "done"
    measured_on._cached_fingerprint.cache_clear()
    assert _attempt(tmp_path, job, "sys.exit(1)", monkeypatch).run() == "done"
    assert read_result(tmp_path, KEY).metrics == {"own": 0.25}
    (images / "a.png").write_bytes(b"2")
    measured_on._cached_fingerprint.cache_clear()
    assert _attempt(tmp_path, job, "sys.exit(1)", monkeypatch).run() == "done"
    assert read_result(tmp_path, KEY).metrics == {"own": 0.75}


def test_inputs_count_by_pattern_or_list_and_outputs_do_not(
    tmp_path: Path,
) -> None:
    def now(*options: str) -> Fingerprint:
        measured_on._cached_fingerprint.cache_clear()
        return measured_on.measurement_fingerprint("knn", ["evaluate", "knn", "run", *options])

    shards, log = [tmp_path / f"{number}.tar" for number in (0, 1)], tmp_path / "log.jsonl"
    for path in (*shards, log):
        path.write_bytes(b"1")
    line = (f"--train={tmp_path}/{{0..1}}.tar", "--test", str(tmp_path), "--log", str(log))
    for options in (line[:1], (*line[:1], *line[3:]), (*line[:1], f"--log={log}")):
        before = now(*options)
        log.write_bytes(log.read_bytes() + b"1")
        assert measured_on.changed_input(before, now(*options)) == []
        shards[0].write_bytes(shards[0].read_bytes() + b"1")
        assert "sizes" in measured_on.changed_input(before, now(*options))[0]
    for options in (line[:1], ("--test", str(shards[1]))):
        before = now(*options)
        (tmp_path / "classes.txt").write_text("0\tcat\n")
        assert "names" in measured_on.changed_input(before, now(*options))[0]
        (tmp_path / "classes.txt").unlink()
    listed = tmp_path / "test.txt"
    listed.write_text("0.tar\n")
    before = now(f"--test={listed}")
    shards[0].write_bytes(shards[0].read_bytes() + b"1")
    assert "sizes" in measured_on.changed_input(before, now(f"--test={listed}"))[0]
    (tmp_path / "sub").mkdir()
    before = now(*line[1:])
    (tmp_path / "sub" / "empty").mkdir()
    assert measured_on.changed_input(before, now(*line[1:])) == []


def test_training_tells_what_happened_and_how_many_images_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = "checkpoints/step_00000004/state.json"
    code = f"{_training(tmp_path, loss=1.0)}; pathlib.Path(folder, {state!r}).write_text("
    code += '\'{"plan": {"num_images": 48}}\'); '
    code += "pathlib.Path(folder, 'events.jsonl').write_text('{\"event\": \"collapse\"}')"
    attempt = _attempt(tmp_path, Job(KEY, metrics={"loss": "online"}), code, monkeypatch)
    assert attempt.run() == "done"
    result = read_result(tmp_path, KEY)
    assert (result.num_images, result.events) == (48, {"collapse": 1})
    assert row_of(planned(0), attempt.job, result, metrics={}).distinct_images == 48  # 64 planned


def test_metric_that_is_not_finite_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(KEY, metrics={"loss": "online"})
    assert _attempt(tmp_path, job, _training(tmp_path, loss=None), monkeypatch).run() == "done"
    assert read_result(tmp_path, KEY).metrics == {"loss": None}


@pytest.mark.parametrize(
    ("code", "ending", "error"),
    [
        ("print('error: lr: too high'); sys.exit(2)", "bad input", "lr: too high"),
        ("print('error: a'); print('error: b'); print(flush=True); sys.exit(1)", "failed", "b"),
        ("sys.exit('no such thing')", "failed", "no such thing"),
        (
            "print('OutOfMemoryError: 3 GB', flush=True);"
            " sys.exit('error: dinoscale failed; this is a bug')",
            "failed",
            "OutOfMemoryError: 3 GB",
        ),
        (
            "import os; os.kill(os.getpid(), 9)",
            "failed",
            "killed by SIGKILL, perhaps out of memory; last output: ",
        ),
        ("sys.exit(75)", "stopped", ""),
        ("import os; os.kill(os.getpid(), 15)", "stopped", ""),
    ],
)
def test_end_of_a_training_is_classified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, ending: str, error: str
) -> None:
    (tmp_path / "job.log").write_text("error: of an earlier start\n")
    assert _attempt(tmp_path, Job(KEY), code, monkeypatch).run() == ending
    result = read_result(tmp_path, KEY)
    assert (result.ending, result.trained) == (ending, False)
    assert result.error.startswith(error)
    assert bool(result.error) == bool(error)


def test_a_preempted_run_is_recognized_behind_a_launcher_that_hides_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = json.dumps({"event": "preempted"})
    code = f"open({str(tmp_path / 'events.jsonl')!r}, 'a').write({event!r} + chr(10)); sys.exit(1)"
    assert _attempt(tmp_path, Job(KEY), code, monkeypatch).run() == "stopped"
    assert _attempt(tmp_path, Job(KEY), "sys.exit(1)", monkeypatch).run() == "failed"


def test_job_asked_to_stop_asks_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    code = "import signal; signal.signal(15, lambda *_: ("
    code += f"open({str(saved)!r}, 'w'), time.sleep(0.3), sys.exit(75))); "
    code += f"open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(280)"
    attempt = _attempt(tmp_path, Job(KEY), code, monkeypatch)
    monkeypatch.setattr(
        job_module, "HEARTBEAT_S", 0.0
    )  # every look at the training is a beat, and the first after its start stops it
    update = attempt._update

    def stop_when_ready(**changes: object) -> None:
        update(**changes)
        if (tmp_path / "ready").exists():
            attempt.stop.set()

    monkeypatch.setattr(attempt, "_update", stop_when_ready)
    assert attempt.run() == "stopped"
    assert saved.exists()
    result = read_result(tmp_path, KEY)
    assert (result.ending, result.trained) == ("stopped", False)
    assert result.seconds > 0.2


def test_second_job_of_a_run_waits_for_the_first(tmp_path: Path) -> None:
    write_record(tmp_path, Job(KEY))
    code = "import sys; from pathlib import Path; from dinoscale.runtime.locks import try_lock"
    code += f"; lock = try_lock(Path({str(tmp_path / '.job.lock')!r})); print(flush=True)"
    code += "; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        first.stdout.readline()
        write_record(tmp_path, Result(KEY, seconds=5.0))
        second = subprocess.Popen(
            [sys.executable, "-m", "dinoscale.scaling.sweep.job", str(tmp_path)],
            stdin=subprocess.PIPE,
        )
        time.sleep(0.5)
        assert second.poll() is None
        second.communicate(timeout=200)  # the end of its input asks it to stop
        assert second.returncode == 75
        assert read_result(tmp_path, KEY) == Result(KEY, seconds=5.0)  # not its to touch
        first.communicate()


def test_command_of_each_launcher(tmp_path: Path) -> None:
    def words(environ: dict[str, str], **job: int) -> list[str]:
        return training_command(Job(KEY, **job), tmp_path, environ)  # type: ignore[arg-type]

    train = ["dinoscale", "train", str(tmp_path / "settings.yaml")]
    assert words({}) == [sys.executable, "-m", *train]
    several = words({}, processes=3)
    assert several[1:5] == ["-m", "deepspeed.launcher.runner", "--num_accelerators", "3"]
    assert several[-4:] == ["--module", *train]
    visible = words({"CUDA_VISIBLE_DEVICES": "5,2"}, processes=2)
    assert visible[1:5] == ["-m", "deepspeed.launcher.runner", "--include", "localhost:5,2"]
    by_uuid = words({"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-2b"}, processes=2)
    assert by_uuid[1:7] == ["-m", "torch.distributed.run", *["--nnodes", "1", "--node-rank", "0"]]
    slurm = {"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "40123"}
    assert words(slurm, nodes=2, processes=8)[1:] == [
        *("-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "1"),
        *("--nproc-per-node", "8", "--master-addr", "gpu07", "--master-port", "20123"),
        *("-m", *train),
    ]


def test_headline_becomes_an_error() -> None:
    report = {"task": "knn", "score": {"top1": 62.5, "top5": 90.0}}
    assert headline_error(f"noise\n{json.dumps(report)}\n") == 0.375
    assert headline_error('{"score": {"top1": NaN}}') is None
    for text in ("", "[]", "{}", '{"score": {}}', '{"score": {"top1": "x"}}'):
        with pytest.raises(RunFailedError, match="printed no score"):
            headline_error(text)


def _log(folder: Path, *lines: object) -> Path:
    path = folder / "metrics.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts))
    return path


def test_damaged_lines_of_a_log_are_skipped(tmp_path: Path) -> None:
    good = {"step": 2, "images": 8, "loss": 1.5}
    path = _log(tmp_path, good, "{", "7", '{"step": "x"}', "[" * 9999, {"step": 3, "saved": 1})
    assert read_points(path) == [good]
    assert last_step(path) == 3
    assert last_step(tmp_path / "nowhere") == 0


def test_online_metrics_are_the_last_accuracy_and_the_last_tenth_of_the_losses(
    tmp_path: Path,
) -> None:
    losses = [{"step": step, "images": step, "loss": float(step)} for step in range(1, 41)]
    points = read_points(_log(tmp_path, *losses, {"step": 20, "knn_top1": 10.0}))
    assert online_metric(points, "loss") == (37 + 38 + 39 + 40) / 4
    assert online_metric(points, "knn") == 0.9
    broken = read_points(_log(tmp_path, *losses, {"step": 41, "loss": None}))
    assert online_metric(broken, "loss") is None
    with pytest.raises(RunFailedError, match="has no knn"):
        online_metric(broken, "knn")


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = [{"step": step, "loss": 1.0} for step in range(5000)]
    lines += [{"step": step, "knn_top1": 1.0} for step in range(0, 5000, 1000)]
    points = thin(read_points(_log(tmp_path, *lines)))
    assert len(points) == 200
    assert [point["step"] for point in points if "knn" in point] == [0, 1000, 2000, 3000, 4000]
    assert points[-1]["step"] == 4999
    assert points == sorted(points, key=lambda point: point["step"] or 0)


def test_last_error_of_a_log_without_one_is_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    assert last_error(path, 0) == ""
    path.write_text("a\n 3%|  |\r 4%|  |\n\n")
    assert last_error(path, 0) == "4%|  |"
