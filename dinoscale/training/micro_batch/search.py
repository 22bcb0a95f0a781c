"""Find the largest micro-batch that fits on every rank, before training allocates any memory.

Each size is tried by one child process of each rank (trial.py); the children form a process group
of their own, so that running out of memory there does not touch the run.
"""

import contextlib
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

from dinoscale.config import RunConfig, micro_batch_sizes
from dinoscale.errors import ConfigError, PreemptedError, RunFailedError, UnavailableError
from dinoscale.runtime import distributed
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.memory import NO_MEMORY
from dinoscale.runtime.preemption import SIGNALS

log = logging.getLogger(__name__)

_POLL_S = 0.1
_QUOTED = 5  # last lines of a child that a message quotes
_SEARCHED = 40  # last lines searched for a memory error; an earlier one was a warning
_LOST_CONTACT = "lost contact with another rank"  # a consequence, not the cause
_BUSY = "busy or unavailable"  # of cudaErrorDevicesUnavailable
# What a limited process says where C code does not report that an allocation failed: CPython in an
# import or a call, a thread that finds no room for its stack (Gloo; C++ that ends meanwhile).
_STARVED = re.compile(
    r"SystemError: .*(error return without|without setting an) exception"
    r"|can't start new thread|Resource temporarily unavailable"
    r"|terminate called without an active exception"
)


Verdict = Literal["fits", "too large", "busy", "failed", "cut off", "asked to stop"]


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        size: the largest micro-batch that fits, in images.
        peak_bytes: peak memory of its trial on the rank that needed most.
        trials: number of sizes tried.
        seconds: duration of the search.
    """

    size: int
    peak_bytes: int
    trials: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a trial ended on one rank.

    Attributes:
        verdict: `cut off` if it was ended because another rank's had ended, `busy` if the
            accelerator admits no second process.
        limit_bytes: its memory limit, if it got far enough to set one.
        peak_bytes: its peak memory, if it fits.
        exit_code: of the child, if it failed.
        last_lines: of its output.
    """

    verdict: Verdict
    limit_bytes: int | None = None
    peak_bytes: int = 0
    exit_code: int = 1
    last_lines: str = ""


def largest_that_fits(candidates: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest candidate that fits, by bisection: about log2 of their number of trials.

    Args:
        candidates: ascending.
        fits: whether one fits; if one does, so do all smaller ones.

    Returns:
        The candidate, None if none fits.
    """
    low, high = 0, len(candidates)  # the first `low` candidates fit, those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            low = middle + 1
        else:
            high = middle
    return candidates[low - 1] if low else None


def find_micro_batch(
    config: RunConfig,
    process: Process,
    *,
    moved: Callable[[str], None],
    stop_asked: Callable[[], bool],
) -> SearchResult:
    """Try sizes that divide a rank's share of a step; all ranks call it together.

    Args:
        config: of the run.
        process: this rank.
        moved: called before each trial with a description of it.
        stop_asked: whether this rank was asked to stop.

    Raises:
        ConfigError: not even the smallest size fits, or the configuration is wrong.
        PreemptedError: a rank was asked to stop.
        RunFailedError: a trial failed for another reason than memory.
    """
    begin = time.monotonic()
    tried: dict[int, list[Outcome]] = {}
    sizes = micro_batch_sizes(config, world_size=process.world_size)
    last = ""  # the last trial, in words

    def fits(size: int) -> bool:
        nonlocal last
        moved(f"trying a micro-batch of {size}")
        if process.rank == 0:
            log.info("%strying %d", f"{last}; " if last else "train.micro_batch_size=auto: ", size)
        tried[size] = _try(config, process, size, stop_asked)
        fitting = _judge(tried[size], size)
        last = _in_words(tried[size], size, fits=fitting)
        return fitting

    size = largest_that_fits(sizes, fits)
    if size is None:
        raise ConfigError(_none_fits(last))
    peak = max(outcome.peak_bytes for outcome in tried[size])
    found = SearchResult(size, peak, len(tried), time.monotonic() - begin)
    if process.rank == 0:
        log.info("%s; taking %d after %d trials, %.0f s", last, size, found.trials, found.seconds)
    return found


def _judge(outcomes: Sequence[Outcome], size: int) -> bool:
    """Whether a size fits on all ranks.

    Raises:
        DinoscaleError: the trial was stopped or failed, so it is not known.
    """
    verdicts = [outcome.verdict for outcome in outcomes]
    if "asked to stop" in verdicts:
        raise PreemptedError("asked to stop before the first step; the same command starts again")
    if "busy" in verdicts:
        raise ConfigError(
            f"train.micro_batch_size=auto: the GPU of rank {verdicts.index('busy')} admits one"
            " process at a time (compute mode EXCLUSIVE_PROCESS), and a trial is a second one."
            " Set train.micro_batch_size to a number, which `dinoscale plan` estimates, or have"
            " the mode set to DEFAULT (`nvidia-smi -c 0`, or an option of your scheduler)"
        )
    if "too large" in verdicts:
        return False
    failed = [rank for rank, verdict in enumerate(verdicts) if verdict == "failed"]
    if failed:
        rank = next((r for r in failed if _LOST_CONTACT not in outcomes[r].last_lines), failed[0])
        code, lines = outcomes[rank].exit_code, outcomes[rank].last_lines
        kinds = {kind.exit_code: kind for kind in (ConfigError, UnavailableError)}
        raise kinds.get(code, RunFailedError)(
            f"train.micro_batch_size=auto: the trial of {size} failed on rank {rank} (exit code"
            f" {code}), not for lack of memory:\n{lines}"
        )
    if "cut off" in verdicts:  # and yet no rank says what ended its trial
        raise RunFailedError(
            f"train.micro_batch_size=auto: the trial of {size} was cut off on rank"
            f" {verdicts.index('cut off')} though it failed on no rank. Start again, or set"
            " train.micro_batch_size to a number, which `dinoscale plan` estimates"
        )
    return True


def _in_words(outcomes: Sequence[Outcome], size: int, *, fits: bool) -> str:
    if fits:
        peak = max(outcome.peak_bytes for outcome in outcomes)
        return f"micro-batch {size} fits (peak {peak / 2**30:.1f} GiB)"
    limits = [o.limit_bytes for o in outcomes if o.verdict == "too large" and o.limit_bytes]
    needs = f" (needs more than {min(limits) / 2**30:.1f} GiB)" if limits else ""
    return f"micro-batch {size} does not fit{needs}"


def _none_fits(smallest: str) -> str:
    return (
        f"train.micro_batch_size=auto: even {smallest}. Set engine.checkpoint_every_k_blocks=1,"
        " engine.zero_stage=3 with more ranks, smaller crops (crops.global_size, crops.num_local),"
        " or a smaller model"
    )


def _try(
    config: RunConfig, process: Process, size: int, stop_asked: Callable[[], bool]
) -> list[Outcome]:
    """Run one trial on all ranks; if it fails on one, the others are cut off."""
    port = distributed.broadcast_object(distributed.free_port())
    request = {"config": config.model_dump(mode="json"), "micro_batch_size": size}
    # The port alone does not name a trial: that of an earlier one may be free again.
    store, key = distributed.KeyValueStore(), f"the trial of {size} at port {port} failed"
    with tempfile.TemporaryFile() as output:
        try:
            with _start(process, port, request, output) as child:
                try:
                    verdict = _wait(child, stop_asked, lambda: store.get(key) is not None)
                finally:
                    child.kill()
            if verdict is None and child.returncode and stop_asked():
                verdict = "asked to stop"  # Ctrl-C reaches the child as well
            outcome = _outcome(verdict, child.returncode, output)
        except OSError as error:
            outcome = Outcome("failed", last_lines=f"cannot start a process: {error}")
    if outcome.verdict != "fits":
        store.set(key, outcome.verdict)
    return distributed.gather_objects(outcome)


def _start(
    process: Process, port: int, request: dict[str, Any], output: IO[bytes]
) -> "subprocess.Popen[bytes]":
    """Start this rank's child, which meets the others' at `port` of the first rank."""
    own = {
        "RANK": process.rank,
        "WORLD_SIZE": process.world_size,
        "LOCAL_RANK": process.local_rank,
        "MASTER_PORT": port,
    }
    if process.knows_node:
        own["LOCAL_WORLD_SIZE"] = process.local_world_size
    environment = os.environ | {name: str(value) for name, value in own.items()}
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # that store belongs to the parents
    child = subprocess.Popen(
        [sys.executable, "-m", "dinoscale.training.micro_batch.trial"],
        bufsize=0,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # the child has died; its output says why
        child.stdin.write(json.dumps(request).encode() + b"\n")  # stays open: it ends with us
    return child


def _wait(
    child: "subprocess.Popen[bytes]", stop_asked: Callable[[], bool], cut_off: Callable[[], bool]
) -> Verdict | None:
    """Wait for the child's end; return a verdict if the wait was given up."""
    while child.poll() is None:
        if stop_asked():
            return "asked to stop"
        if cut_off():
            return "cut off" if child.poll() is None else None
        time.sleep(_POLL_S)
    return None


def _outcome(verdict: Verdict | None, exit_code: int, output: IO[bytes]) -> Outcome:
    """The outcome of a child that has ended."""
    output.seek(0)
    lines = output.read().decode(errors="replace").splitlines()
    found: dict[str, int | None] = {}
    for line in lines:
        if line.startswith('{"'):
            with contextlib.suppress(ValueError):
                found |= json.loads(line)
    limit, peak = found.get("limit_bytes"), found.get("peak_bytes")
    inherited, _ = resource.getrlimit(resource.RLIMIT_DATA)
    limited = limit is not None or inherited != resource.RLIM_INFINITY
    quoted, searched = "\n".join(lines[-_QUOTED:]), "\n".join(lines[-_SEARCHED:])
    if verdict is None:
        if exit_code == 0 and peak is not None:
            verdict = "fits"
        elif -exit_code in SIGNALS:  # a launcher signals all its descendants
            verdict = "asked to stop"
        elif (
            exit_code == -signal.SIGKILL
            or NO_MEMORY.search(searched)
            or (limited and _STARVED.search(searched))
        ):
            verdict = "too large"
        elif _BUSY in searched:
            verdict = "busy"
        else:
            verdict = "failed"
    return Outcome(verdict, limit, peak or 0, exit_code, quoted)
