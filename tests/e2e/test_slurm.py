"""The batch script of Slurm: what it starts, and what it makes of each exit code and signal."""

import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launchers" / "slurm.sbatch"

_SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$LOGS/srun"
env > "$LOGS/environment"
end() { until [[ -e $LOGS/may_end ]]; do sleep 0.02; done; exit "$1"; }
trap 'trap "" USR1; echo USR1 >> "$LOGS/signals"; end 75' USR1
trap 'trap "" TERM; echo TERM >> "$LOGS/signals"; end "${ON_TERM:-143}"' TERM
touch "$LOGS/started"
[[ $SRUN_DOES == wait ]] || exit "$SRUN_DOES"
while :; do sleep 0.02; done
"""
_SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$LOGS/scontrol"
exit "${SCONTROL_DOES:-0}"
"""


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Where the two programs say how they were called."""
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


def _start(logs: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    path = f"{logs.parent / 'bin'}{os.pathsep}{kept['PATH']}"
    ours = {"PATH": path, "LOGS": str(logs), "SLURM_JOB_ID": "4711", **variables}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments], env=kept | ours, stderr=subprocess.PIPE, text=True
    )


def _run(logs: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    process = _start(logs, *arguments, **variables)
    _, stderr = process.communicate(timeout=200)
    return process.returncode, stderr


def _calls(logs: Path, program: str) -> list[str]:
    file = logs / program
    return file.read_text().splitlines() if file.exists() else []


def _wait_for(file: Path) -> None:
    end = time.monotonic() + 200
    while not file.exists():
        assert time.monotonic() < end, f"no {file.name}"
        time.sleep(0.01)


def test_arguments_reach_the_training_as_they_are(logs: Path) -> None:
    arguments = ["my run.yaml", "data.train=/a b/{0..9}.tar", "run_dir=$HOME;*", ""]
    code, _ = _run(logs, *arguments, SRUN_DOES="0", SLURM_CPUS_PER_TASK="9")
    assert code == 0
    assert _calls(logs, "srun") == ["python", "-m", "dinoscale", "train", *arguments]
    environment = _calls(logs, "environment")
    assert "SRUN_CPUS_PER_TASK=9" in environment
    assert not [line for line in environment if line.startswith("MASTER_")]  # dinoscale's to choose
    assert not _calls(logs, "scontrol")


def test_array_task_fills_in_its_number(logs: Path) -> None:
    arguments = ["sweep/%a.yaml", "run_dir=runs/%a of %a", "data.train=50%"]
    _run(logs, *arguments, SRUN_DOES="0", SLURM_ARRAY_TASK_ID="7")
    assert _calls(logs, "srun")[4:] == ["sweep/7.yaml", "run_dir=runs/7 of 7", "data.train=50%"]
    _run(logs, *arguments, SRUN_DOES="0")
    assert _calls(logs, "srun")[4:] == arguments


def test_saved_run_goes_back_to_the_queue(logs: Path) -> None:
    code, stderr = _run(logs, "c.yaml", SRUN_DOES="75")
    assert code == 0
    assert _calls(logs, "scontrol") == ["requeue 4711"]
    assert "job 4711 is in the queue again" in stderr


@pytest.mark.parametrize(
    ("state", "calls"),
    [
        ("RUNNING", ["requeue 4711"]),
        ("SIGNALING", ["requeue 4711"]),
        ("COMPLETING", []),
        ("CANCELLED", []),
    ],
)
def test_job_that_was_cancelled_is_not_requeued(logs: Path, state: str, calls: list[str]) -> None:
    squeue = logs.parent / "bin" / "squeue"
    squeue.write_text(f"#!/usr/bin/env bash\necho {state}\n")
    squeue.chmod(0o755)
    code, stderr = _run(logs, "c.yaml", SRUN_DOES="75")
    assert _calls(logs, "scontrol") == calls
    assert code == (0 if calls else 75)
    assert calls or f"was cancelled ({state}) and is not requeued" in stderr


def test_task_of_an_array_goes_back_alone(logs: Path) -> None:
    squeue = logs.parent / "bin" / "squeue"
    squeue.write_text(  # the number of the last task is that of the array: all tasks are listed
        "#!/usr/bin/env bash\n[[ $* == *4711_7* ]] || echo COMPLETING; echo RUNNING\n"
    )
    squeue.chmod(0o755)
    ours = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "7"}
    assert _run(logs, "c.yaml", SRUN_DOES="75", **ours)[0] == 0
    assert _calls(logs, "scontrol") == ["requeue 4711_7"]


@pytest.mark.parametrize("code", [0, 1, 2, 74, 76, 130, 137, 255])
def test_other_exit_codes_are_passed_on(logs: Path, code: int) -> None:
    found, stderr = _run(logs, "c.yaml", SRUN_DOES=str(code))
    assert found == code
    assert f"job 4711 ended with exit code {code}" in stderr
    assert not _calls(logs, "scontrol")


def test_job_that_cannot_be_requeued_says_so(logs: Path) -> None:
    code, stderr = _run(logs, "c.yaml", SRUN_DOES="75", SCONTROL_DOES="1")
    assert code == 75
    assert "saved, but job 4711 cannot be requeued; submit it again" in stderr


def test_missing_scontrol_says_so(logs: Path) -> None:
    (logs.parent / "bin" / "scontrol").unlink()
    code, stderr = _run(logs, "c.yaml", SRUN_DOES="75")
    assert code == 75
    assert "cannot be requeued" in stderr


def test_missing_srun_is_a_failure(logs: Path) -> None:
    programs = logs.parent / "bin"
    (programs / "srun").unlink()
    (programs / "bash").symlink_to(str(shutil.which("bash")))
    code, said = _run(
        logs, "c.yaml", SRUN_DOES="0", PATH=str(programs)
    )  # without that of the system
    assert code == 127
    assert "no python in PATH; activate" in said
    assert not _calls(logs, "scontrol")


@pytest.mark.parametrize(
    ("number", "name", "code", "calls"),
    [
        (signal.SIGUSR1, "USR1", 0, ["requeue 4711"]),
        (signal.SIGTERM, "TERM", 143, []),
        (signal.SIGTERM, "TERM", 75, []),  # of scancel: saved, and not to be started again
    ],
)
def test_signal_to_the_shell_reaches_srun_and_is_waited_for(
    logs: Path, number: signal.Signals, name: str, code: int, calls: list[str]
) -> None:
    process = _start(logs, "c.yaml", SRUN_DOES="wait", ON_TERM=str(code))
    try:
        _wait_for(logs / "started")
        process.send_signal(number)
        _wait_for(logs / "signals")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)  # srun goes on
        (logs / "may_end").touch()
        assert process.wait(timeout=200) == code
    finally:
        process.kill()
        process.communicate()
    assert _calls(logs, "signals") == [name]
    assert _calls(logs, "scontrol") == calls


def test_many_signals_lose_no_exit_code(logs: Path) -> None:
    process = _start(logs, "c.yaml", SRUN_DOES="wait")
    try:
        _wait_for(logs / "started")
        for count in itertools.count():
            if process.poll() is not None:  # to the end: none may cut the requeue short
                break
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.005)
            if count == 50:
                (logs / "may_end").touch()
        assert count > 50
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
    assert _calls(logs, "scontrol") == ["requeue 4711"]


def test_outside_of_slurm_nothing_is_started(logs: Path) -> None:
    code, stderr = _run(logs, "c.yaml", SRUN_DOES="0", SLURM_JOB_ID="")
    assert code != 0
    assert "this is a script for sbatch" in stderr
    assert not _calls(logs, "srun")


def test_options_of_the_job_are_there() -> None:
    lines = SCRIPT.read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--signal=USR1@180", "--open-mode=append", "--requeue"} <= options
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]  # ignored
