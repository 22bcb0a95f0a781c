"""From the file of a sweep to its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dinoscale.config.sweep.file import SweepConfig
from dinoscale.errors import ConfigError
from dinoscale.scaling.design.axis_values import Point, label_of, points
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.design.resolved_run import Planner
from dinoscale.scaling.number_text import SAME

_MAX_TOLD = 8  # mistakes in a message


@dataclass(frozen=True)
class LeftOut:
    """A model and a budget without a run.

    Attributes:
        name: of its point.
        axes: as of `PlannedRun`.
        images: that the budget leaves it.
        why: in words.
    """

    name: str
    axes: Mapping[str, object]
    images: int
    why: str


@dataclass(frozen=True)
class Design:
    """A sweep worked out.

    Attributes:
        runs: those first that cost least.
        left_out: by the limits of the design isoflop.
        notes: what had to be assumed, in words.
    """

    runs: list[PlannedRun]
    left_out: list[LeftOut]
    notes: list[str]


def plan_runs(sweep: SweepConfig) -> list[PlannedRun]:
    """All runs, those first that cost least.

    Raises:
        ConfigError: one of them is impossible, or two are the same.
    """
    return work_out(sweep).runs


def work_out(sweep: SweepConfig) -> Design:
    """The runs, and what there is to say about them.

    Raises:
        ConfigError: as `plan_runs`.
    """
    planner = Planner(sweep)
    found: list[PlannedRun | LeftOut] = []
    mistakes: list[str] = []
    for point in points(sweep):
        result = _planned(planner, point)
        if isinstance(result, ConfigError):
            mistakes += [f"run {label_of(point)}: {line}" for line in str(result).splitlines()]
        else:
            found.append(result)
    if mistakes:
        raise ConfigError(shortened(mistakes))
    runs = [run for run in found if isinstance(run, PlannedRun)]
    if not runs:
        raise ConfigError(
            "isoflop: its limits leave out every run; widen min_images and max_images, or change "
            "axes.flops"
        )
    _require_different(runs)
    runs.sort(key=lambda run: (run.flops, run.parameters, run.name))
    notes = [*planner.notes, *_thin_budgets(runs), *_missed_budgets(runs)]
    return Design(runs, [run for run in found if isinstance(run, LeftOut)], notes)


def _planned(planner: Planner, point: Point) -> PlannedRun | LeftOut | ConfigError:
    """A run, or why there is none."""
    try:
        candidate = planner.candidate(point)
        images = candidate.budget_images
        why = _why_not(planner.sweep, images)
        if why and images is not None:
            return LeftOut(label_of(point), candidate.axes, int(images), why)
        return planner.planned(candidate)
    except ConfigError as error:
        return error


def _why_not(sweep: SweepConfig, images: float | None) -> str:
    """Why the limits of the design leave a run out; empty where they do not."""
    limits = sweep.isoflop
    if sweep.design != "isoflop" or images is None:
        return ""
    if images < limits.min_images:
        return f"fewer than min_images, {limits.min_images:,.0f}"
    if limits.max_images is not None and images > limits.max_images:
        return f"more than max_images, {limits.max_images:,.0f}"
    return ""


def _thin_budgets(runs: Sequence[PlannedRun]) -> list[str]:
    """Budgets with too few models for a parabola."""
    models: dict[object, set[object]] = {}
    for run in runs:
        if "flops" in run.axes:
            models.setdefault(run.axes["flops"], set()).add(run.axes.get("model"))
    return [
        f"only {len(found)} of the 3 models that a minimum needs at {flops:g} FLOPs"
        for flops, found in models.items()
        if len(found) < 3
    ]


def _missed_budgets(runs: Sequence[PlannedRun]) -> Iterator[str]:
    """Runs that whole steps an epoch keep so far from their budget that fits leave them apart."""
    missed: dict[float, list[tuple[PlannedRun, float]]] = {}
    for run in runs:
        budget = run.axes.get("flops")
        if isinstance(budget, float) and run.flops * (1 + SAME) < budget:
            missed.setdefault(budget, []).append((run, run.flops / budget))
    for budget, found in missed.items():
        _, least = min(found, key=lambda pair: pair[1])
        epochs = min(_epochs_that_fit(run, share) for run, share in found)
        names = ", ".join(run.name for run, _ in found[:_MAX_TOLD])
        yield (
            f"{len(found)} runs at {budget:g} FLOPs have as little as {least:.0%} of them, as an"
            f" epoch is whole steps ({names}): they do not count as runs of one budget; set"
            f" train.epochs in settings to at most {epochs}, or a smaller batch"
        )


def _epochs_that_fit(run: PlannedRun, share: float) -> int:
    """Epochs of which each has so many steps that a lost part of one hardly matters."""
    steps = run.steps / share
    return max(1, int(steps * SAME / (1 + SAME)))


def shortened(mistakes: Sequence[str]) -> str:
    """The first mistakes, one a line, and how many more there are."""
    more = len(mistakes) - _MAX_TOLD
    return "\n".join([*mistakes[:_MAX_TOLD], *([f"and {more} more"] if more > 0 else [])])


def _require_different(runs: Sequence[PlannedRun]) -> None:
    names: dict[str, str] = {}
    for run in runs:
        if run.key in names:
            raise ConfigError(
                f"runs {names[run.key]} and {run.name} are the same: they do not differ in "
                "anything that a result depends on; leave out one of the values"
            )
        names[run.key] = run.name
