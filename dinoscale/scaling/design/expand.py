"""Expand the file of a sweep into its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dinoscale.config.sweep.file import SweepConfig
from dinoscale.errors import ConfigError
from dinoscale.scaling.design.axis_values import Point, label_of, points
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.design.resolved_run import Planner
from dinoscale.scaling.number_text import SAME

_MAX_SHOWN = 8  # mistakes in a message


@dataclass(frozen=True)
class ExcludedRun:
    """A model and a budget outside the limits of the design isoflop.

    Attributes:
        name: label of its point.
        axes: as in `PlannedRun`.
        images: images that the budget pays for.
        why: the limit it violates.
    """

    name: str
    axes: Mapping[str, object]
    images: int
    why: str


@dataclass(frozen=True)
class Design:
    """The runs of a sweep.

    Attributes:
        runs: cheapest first.
        left_out: combinations that the limits of the design isoflop exclude.
        notes: assumptions and warnings, in sentences.
    """

    runs: list[PlannedRun]
    left_out: list[ExcludedRun]
    notes: list[str]


def plan_runs(sweep: SweepConfig) -> list[PlannedRun]:
    """All runs, cheapest first.

    Raises:
        ConfigError: a run is invalid, or two are the same.
    """
    return expand_sweep(sweep).runs


def expand_sweep(sweep: SweepConfig) -> Design:
    """The runs, the excluded combinations, and notes on both.

    Raises:
        ConfigError: as in `plan_runs`.
    """
    planner = Planner(sweep)
    found: list[PlannedRun | ExcludedRun] = []
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
            "isoflop: the limits exclude every run; widen min_images and max_images, or change "
            "axes.flops"
        )
    _require_different(runs)
    runs.sort(key=lambda run: (run.flops, run.parameters, run.name))
    notes = [*planner.notes, *_thin_budgets(runs), *_missed_budgets(runs)]
    return Design(runs, [run for run in found if isinstance(run, ExcludedRun)], notes)


def _planned(planner: Planner, point: Point) -> PlannedRun | ExcludedRun | ConfigError:
    """The run at a point, or why there is none."""
    try:
        draft = planner.draft(point)
        images = draft.budget_images
        why = _why_not(planner.sweep, images)
        if why and images is not None:
            return ExcludedRun(label_of(point), draft.axes, int(images), why)
        return planner.planned(draft)
    except ConfigError as error:
        return error


def _why_not(sweep: SweepConfig, images: float | None) -> str:
    """Why the limits of the design exclude a run; empty where they do not."""
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
        f"{flops:g} FLOPs: only {len(found)} of the 3 models that a minimum needs"
        for flops, found in models.items()
        if len(found) < 3
    ]


def _missed_budgets(runs: Sequence[PlannedRun]) -> Iterator[str]:
    """Runs so far below their budget, by rounding to whole steps, that a fit separates them."""
    missed: dict[float, list[tuple[PlannedRun, float]]] = {}
    for run in runs:
        budget = run.axes.get("flops")
        if isinstance(budget, float) and run.flops * (1 + SAME) < budget:
            missed.setdefault(budget, []).append((run, run.flops / budget))
    for budget, found in missed.items():
        _, least = min(found, key=lambda pair: pair[1])
        epochs = min(_epochs_that_fit(run, share) for run, share in found)
        names = ", ".join(run.name for run, _ in found[:_MAX_SHOWN])
        yield (
            f"{len(found)} runs at {budget:g} FLOPs reach as little as {least:.0%} of it, as an"
            f" epoch is rounded to whole steps ({names}): a fit will not count them as one budget;"
            f" set train.epochs in settings to at most {epochs}, or a smaller batch"
        )


def _epochs_that_fit(run: PlannedRun, share: float) -> int:
    """Most epochs for which rounding each to whole steps stays within `SAME` of the budget."""
    steps = run.steps / share
    return max(1, int(steps * SAME / (1 + SAME)))


def shortened(mistakes: Sequence[str]) -> str:
    """The first mistakes, one per line, and the number of the others."""
    more = len(mistakes) - _MAX_SHOWN
    return "\n".join([*mistakes[:_MAX_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _require_different(runs: Sequence[PlannedRun]) -> None:
    names: dict[str, str] = {}
    for run in runs:
        if run.key in names:
            raise ConfigError(
                f"runs {names[run.key]} and {run.name} are the same: they differ in nothing that "
                "changes the result; remove one of the values"
            )
        names[run.key] = run.name
