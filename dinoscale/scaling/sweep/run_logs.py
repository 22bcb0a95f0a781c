"""Read the logs of a run: metrics during training and at its end, last step, last error."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dinoscale.checkpoint.layout import STATE_FILE, checkpoints
from dinoscale.errors import RunFailedError
from dinoscale.scaling.sweep.run_files import Point, finite_or_none

METRICS = "metrics.jsonl"
_MAX_POINTS = 200  # per curve in the table, as many as a plot can show
_TAIL_BYTES = 2**16  # far more than the last line
_ERROR = re.compile(r"^error: (.+)$", re.MULTILINE)


def read_points(path: Path) -> list[Point]:
    """Loss and k-NN error by ascending step; damaged lines are skipped.

    Returns:
        {"step", "images", "loss" in nats, "knn" as a fraction}, with one or both of the last two.

    Raises:
        RunFailedError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunFailedError(f"{path}: cannot be read ({error.strerror})") from error
    points: dict[int, dict[str, float | None]] = {}
    for line in _lines(text):
        values = {"loss": finite_or_none(line["loss"])} if "loss" in line else {}
        if "knn_top1" in line:
            top1 = finite_or_none(line["knn_top1"])
            values["knn"] = None if top1 is None else 1 - top1 / 100
        if values:
            images = line.get("images")
            own = {"step": line["step"], "images": images if isinstance(images, int) else None}
            point = points.setdefault(line["step"], own)
            point.update(values)
    return [points[step] for step in sorted(points)]


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for text_line in text.splitlines():
        try:
            line = json.loads(text_line)
        except (ValueError, RecursionError):  # cut off by a crash
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def online_metric(points: Sequence[Point], name: str) -> float | None:
    """The last k-NN error (`knn`), or the mean of the last tenth of the losses (`loss`).

    Returns:
        The metric; None where it is not finite.

    Raises:
        RunFailedError: the run has not logged it.
    """
    logged = [point[name] for point in points if name in point]
    if not logged:
        raise RunFailedError(
            f"{METRICS} has no {name}; delete the folder of the run to train it again"
        )
    last = logged[-max(1, len(logged) // 10) :] if name == "loss" else logged[-1:]
    numbers = [value for value in last if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(last) else None


def thin(points: Sequence[Point]) -> list[Point]:
    """At most 200 evenly spaced points; those with a k-NN error and the last one come first."""
    rare = _evenly([point for point in points if "knn" in point], _MAX_POINTS // 2)
    others = [point for point in points if "knn" not in point]
    chosen = [*rare, *_evenly(others, _MAX_POINTS - len(rare))]
    return sorted(chosen, key=lambda point: point["step"] or 0)


def _evenly(points: Sequence[Point], count: int) -> list[Point]:
    if len(points) <= count:
        return list(points)
    return [points[len(points) - 1 - i * len(points) // count] for i in range(count)][::-1]


def last_step(path: Path) -> int:
    """The last logged step, 0 before the first; reads only the end of the file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return 0
    return max((line["step"] for line in _lines(text)), default=0)


def images_of(run_dir: Path) -> int:
    """Number of images in the training set, from the newest checkpoint; 0 where unknown."""
    for checkpoint in reversed(checkpoints(run_dir)):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
            return int(state["plan"]["num_images"])
    return 0


def last_error(path: Path, begin: int) -> str:
    """The last error in a log from byte `begin` on; without one, the last line."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            text = file.read().decode(errors="replace").replace("\r", "\n")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = _ERROR.findall(text)
    if not errors:
        return lines[-1] if lines else ""
    if errors[-1].endswith("this is a bug"):  # the line before names it
        return lines[max(0, lines.index(f"error: {errors[-1]}") - 1)]
    return str(errors[-1])
