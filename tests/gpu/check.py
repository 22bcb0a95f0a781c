"""`tests/gpu/check.sh`: every check a process of its own, in a given time; one JSON object.

A check is a command that prints JSON as its last line and ends with 0 where all is as it should be.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinoscale.runtime.versions import versions

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 480.0
_TAIL = 1500  # characters of what a failed check said


@dataclass(frozen=True)
class Check:
    """One thing to show.

    Attributes:
        name: in the JSON.
        shows: what, in words.
        command: after the interpreter.
        limit_s: seconds, after which it counts as failed; less time than that is no verdict.
        gpus: how many it needs.
    """

    name: str
    shows: str
    command: tuple[str, ...]
    limit_s: float
    gpus: int = 1


def _measure(function: str) -> tuple[str, ...]:
    return ("-m", "tests.gpu.measures", function)


def _bench_step(preset: str, batch: int) -> tuple[str, ...]:
    batches = (f"train.batch_size={batch}", f"train.micro_batch_size={batch}", "optim.min_lr=0")
    turns = ("--turns", "2", "--seconds", "3", "--minutes", "0.9")
    return ("-m", "tests.gpu.measures", "bench_step", preset, *batches, *turns)


_DEATH = "tests/distributed/test_failures.py::test_death_of_a_rank_ends_the_others_with_a_sentence"
CHECKS = [
    Check(
        "stage 3 twice",
        "equal averages after 20 steps, also where the teacher's weights come late",
        _measure("stage_3_twice"),
        90,
        gpus=2,  # else nothing is gathered
    ),
    Check(
        "deterministic", "equal averages after 20 steps of one rank", _measure("alone_twice"), 90
    ),
    Check("host waits", "no step waits for the device", _measure("host_waits"), 90),
    Check("input waits", "nor do crops, colours and noise", _measure("input_waits"), 60),
    Check("bench data", "every part has a rate", _measure("bench_data"), 60),
    Check("bench step S", "beside the literal step", _bench_step("vit_s16", 64), 80),
    Check(
        "a rank killed under NCCL",
        "the other ends with a sentence and exit code 1 within 30 s",
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"{_DEATH}[2]"),
        90,
        gpus=2,
    ),
    Check("plan", "the allocator's peak within 15 %", _measure("plan_memory"), 100),
    Check("bench step B", "beside the literal step", _bench_step("vit_b16", 64), 80),
    Check("auto", "the first size that does not fit is the next", _measure("auto"), 120),
    Check("bench step L", "beside the literal step", _bench_step("vit_l16", 32), 90),
]


def run_checks(checks: Sequence[Check], *, gpus: int, limit_s: float) -> dict[str, dict[str, Any]]:
    """What came out, by name: `status` and what the check said.

    It is passed, failed, skipped (too few GPUs) or not run (too little time was left).

    Args:
        checks: in order.
        gpus: at hand.
        limit_s: seconds for all together.
    """
    end = time.monotonic() + limit_s
    found: dict[str, dict[str, Any]] = {}
    for check in checks:
        if gpus < check.gpus:
            why = f"needs {check.gpus} GPU{'s' * (check.gpus > 1)}, {gpus} here"
            found[check.name] = {"status": "skipped", "why": why}
        else:
            found[check.name] = _run(check, left_s=end - time.monotonic())
        found[check.name]["shows"] = check.shows
        print(f"{check.name}: {found[check.name]['status']}", file=sys.stderr, flush=True)
    return found


def _run(check: Check, *, left_s: float) -> dict[str, Any]:
    if left_s < 1:
        return {"status": "not run", "why": "no time was left"}
    begin, limit_s = time.monotonic(), min(check.limit_s, left_s)
    process = subprocess.Popen(
        [sys.executable, *check.command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # with its ranks, it can be ended as one
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        status, of = ("failed", "") if left_s >= check.limit_s else ("not run", " that were left")
        return {
            "status": status,
            "why": f"did not end in {limit_s:.1f} s{of}",
            "said": said[-_TAIL:],
        }
    result: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1)}
    lines = said.strip().splitlines()
    try:
        result["result"] = json.loads(lines[-1]) if lines else None
    except ValueError:
        result["said"] = lines[-1]
    if process.returncode:
        why = f"ended with exit code {process.returncode}"
        return {"status": "failed", **result, "why": why, "said": said[-_TAIL:]}
    return {"status": "passed", **result}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and print the JSON; the exit code: 1 where one failed or was not run."""
    names = [check.name for check in CHECKS]
    parser = argparse.ArgumentParser(prog="tests/gpu/check.sh", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--minutes", type=float, default=LIMIT_S / 60, metavar="M")
    options = parser.parse_args(arguments)
    begin, gpus = time.monotonic(), torch.cuda.device_count()
    checks = [check for check in CHECKS if check.name in options.only]
    found = run_checks(checks, gpus=gpus, limit_s=60 * options.minutes)
    failed, not_run = (
        [name for name, result in found.items() if result["status"] == status]
        for status in ("failed", "not run")
    )
    report = {
        "gpus": [torch.cuda.get_device_name(number) for number in range(gpus)],
        "cuda": torch.version.cuda,
        "versions": versions(),
        "seconds": round(time.monotonic() - begin, 1),
        "failed": failed,
        "not_run": not_run,
        "checks": found,
    }
    print(json.dumps(report), flush=True)
    return 1 if failed or not_run else 0


if __name__ == "__main__":
    sys.exit(main())
