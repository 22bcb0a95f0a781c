"""Runs of a sweep that nobody has to train, and a program that does their jobs as it is told."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dinoscale.config import load_config
from dinoscale.config.sweep.file import ONLINE
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.sweep.run_files import (
    Result,
    read_job,
    read_result,
    write_record,
)

METRICS = {"knn": ONLINE, "loss": ONLINE}
SCRIPT = "script.json"  # beside the table: what the job of each run does, one start after another

# A program that really trains runs: OUT KIND SEEDS NODES PROCESSES PARALLEL [LINE to measure].
# SEEDS are separated by commas; the run of seed 1 is the long one.
REAL_SWEEP = """
import sys
from pathlib import Path
from dinoscale import cli, __main__
from dinoscale.cli.evaluation.evaluate import evaluation_words
from dinoscale.config.sweep.executor import ExecutorConfig, SlurmConfig
from dinoscale.scaling.sweep.run import run_sweep
from tests.unit.sweep.tiny_sweep import METRICS, planned
out, kind, seeds, nodes, processes, parallel, *line = sys.argv[1:]
if kind == "slurm":  # whose queue is asked every ten seconds
    from dinoscale.scaling.sweep import slurm_jobs
    slurm_jobs._POLL_S["slurm"] = 0.5
cli.run = lambda _: run_sweep(
    [
        planned(seed, "train.epochs=%d" % (24 if seed == 1 else 4))
        for seed in map(int, seeds.split(","))
    ],
    out=Path(out),
    metrics={**METRICS, **{"measured": each for each in line}},
    executor=ExecutorConfig(kind=kind, nodes=int(nodes), processes=int(processes),
        parallel=int(parallel), slurm=SlurmConfig(cpus_per_process=1)),
    retry_failed=False, evaluation_words=evaluation_words)
__main__.main()
"""


def planned(number: int, *overrides: str) -> PlannedRun:
    """A run that a second trains."""
    data = "synthetic:shapes?images=64&size=24&seed=1&split="
    tiny = [
        *("model.embed_dim=16", "model.depth=1", "engine.precision=fp32"),
        *("head.num_prototypes=16", "head.hidden_dim=16", "head.bottleneck_dim=8"),
        *(f"data.train={data}train", f"eval.train={data}train", f"eval.test={data}test"),
        *("train.epochs=4", "train.batch_size=16", "train.micro_batch_size=8"),
        *("log.every_steps=1", "optim.warmup_epochs=0"),
        *("eval.every_epochs=4", f"seed={number}"),
    ]
    config = load_config("quickstart", [*tiny, *overrides])
    name, axes = f"seed{number}-{number:04x}", {"seed": number}
    return PlannedRun(f"{number:016x}", name, config, axes, 1000, 10**6, 256, 64, 16)


def program() -> list[str]:
    """For a `LocalExecutor`."""
    return [sys.executable, "-m", "tests.unit.sweep.tiny_sweep"]


def do_job(run_dir: Path, action: str) -> int:
    """Write what a job that ends so would have written; its exit code."""
    job = read_job(run_dir)
    assert job is not None
    result = read_result(run_dir, job.key)
    trained = action not in ("stopped", "failed", "bad input")
    checkpoint = run_dir / "checkpoints" / "step_00000016"
    if trained:
        checkpoint.mkdir(parents=True, exist_ok=True)
    values = {name: 0.5 for name in job.metrics if action != f"without {name}"}
    missing = action.removeprefix("without ") if trained and action != "done" else ""
    ending = action if not missing and action != "done" else "failed" if missing else "done"
    error = f"metric {missing}: no data" if missing else f"{action} as told"
    result = Result(
        job.key,
        ending=ending,
        error="" if ending in ("done", "stopped") else error,
        seconds=result.seconds + 10,
        trained=trained or result.trained,
        metrics=values if trained else {},
        lines={name: job.metrics[name] for name in values} if trained else {},
    )
    write_record(run_dir, result)
    return {"done": 0, "stopped": 75, "bad input": 2}.get(ending, 1)


def _next_action(run_dir: Path) -> str:
    script = run_dir.parents[1] / SCRIPT
    if not script.exists():
        return "done"
    actions: Sequence[str] = json.loads(script.read_text()).get(run_dir.name, ["done"])
    starts = run_dir / "starts"
    number = len(starts.read_text()) if starts.exists() else 0
    starts.write_text("x" * (number + 1))
    return actions[min(number, len(actions) - 1)]


def _main() -> None:
    run_dir = Path(sys.argv[-1])
    action = _next_action(run_dir)
    print(f"error: {action}", flush=True)
    if action == "wait":  # until asked to stop
        (run_dir / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
        sys.stdin.read()
        action = "stopped"
    elif action == "killed":
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "slow":
        time.sleep(1)
        action = "done"
    sys.exit(do_job(run_dir, action))


if __name__ == "__main__":
    _main()
