"""Metrics of a run: metrics.jsonl, the progress bar and wandb."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dinoscale.errors import DinoscaleError
from dinoscale.runtime.memory import peak_resident_bytes
from dinoscale.runtime.outputs import run_name

log = logging.getLogger(__name__)

_LINE_S = 60.0  # between two lines on a stderr that is not a terminal


class Metrics:
    """Rank 0's record of a run; on other ranks every method does nothing."""

    def __init__(
        self,
        run_dir: Path,
        *,
        active: bool,
        start_step: int,
        total_steps: int,
        wandb_project: str | None,
        config: dict[str, Any],
    ) -> None:
        """Continue `run_dir`/metrics.jsonl after `start_step` steps.

        Lines after `start_step`, written after the last checkpoint of an interrupted start, are
        dropped, as their steps will be taken again.

        Raises:
            DinoscaleError: the file cannot be written.
        """
        self._active = active
        if not active:
            return
        self._path = run_dir / "metrics.jsonl"
        try:
            _drop_lines_after(self._path, start_step)
        except OSError as error:
            raise DinoscaleError(f"run_dir: cannot write {self._path}: {error}") from error
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._step, self._total_steps, self._next_line = start_step, total_steps, 0.0
        self._wandb = _start_wandb(wandb_project, run_dir, config) if wandb_project else None

    def advance(self, text: str) -> None:
        """Advance the bar by one step and show `text`; without a bar, log once a minute."""
        if not self._active:
            return
        self._step += 1
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif self._step == self._total_steps or time.monotonic() >= self._next_line:
            log.info("step %d of %d, %s", self._step, self._total_steps, text)
            self._next_line = time.monotonic() + _LINE_S

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of `values`, in the units of their names; null where not finite."""
        if not self._active:
            return
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:  # a full disk costs the line, not the run
            log.warning("cannot write %s: %s", self._path, error)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def has(self, step: int, name: str) -> bool:
        """Whether a line of `step` has a value of this name."""
        if not self._active:
            return False
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError:  # not there yet, or not readable now: what is due is measured again
            return False
        return any(_step_of(line) == step and name in json.loads(line) for line in lines)

    def rewind(self, step: int) -> None:
        """Go back to `step`: drop the lines after it and move the bar."""
        if not self._active:
            return
        try:
            _drop_lines_after(self._path, step)
        except OSError as error:
            log.warning("cannot write %s: %s", self._path, error)
        self._bar.n = self._step = step
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._active:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the bar and wandb's run."""
        if self._active:
            self._bar.close()
            if self._wandb is not None:
                self._wandb.finish()


class Stopwatch:
    """Images per second and the share of time spent waiting for data, between log lines."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    def waited(self, seconds: float, *, idle_s: float) -> None:
        """Count time in which this rank had no batch and its device was idle.

        Args:
            seconds: for which the host has just waited for a batch.
            idle_s: seconds since the device finished the step before.
        """
        self._waited += min(seconds, idle_s)

    def step_done(self, images: int) -> None:
        """Count the images of one step, over all ranks."""
        self._images += images

    @property
    def waited_s(self) -> float:
        """Seconds without a batch since the last lap."""
        return self._waited

    def lap(self, longest_wait_s: float) -> dict[str, float]:
        """Rates since the last lap: images_per_s over all ranks, data_wait as a fraction.

        Args:
            longest_wait_s: `waited_s` of the rank that waited longest, for which the others wait.
        """
        now = time.perf_counter()
        seconds = max(now - self._begin, 1e-9)
        rates = {"images_per_s": self._images / seconds, "data_wait": longest_wait_s / seconds}
        self._begin, self._waited, self._images = now, 0.0, 0
        return rates


def peak_memory_bytes() -> int:
    """Peak memory of this process: the accelerator's, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        part = path.with_suffix(".jsonl.part")
        part.write_bytes(b"".join(kept))
        part.replace(path)


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except Exception:  # a line cut off by a crash or otherwise damaged can fail in any way
        return float("inf")


def _start_wandb(project: str, run_dir: Path, config: dict[str, Any]) -> Any:
    """Start a wandb run, offline unless WANDB_MODE says otherwise; a failure does not end the run.

    Git and code are off: a remote's address may hold a token, and uncommitted files anything.
    """
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        return wandb.init(
            project=project,
            name=run_name(run_dir),
            dir=str(run_dir),
            config=config,
            resume="allow",
            settings=wandb.Settings(disable_git=True, disable_code=True),
        )
    except Exception as error:  # wandb raises many types of its own
        log.warning("no wandb: %s (log.wandb=false turns it off)", error)
        return None
