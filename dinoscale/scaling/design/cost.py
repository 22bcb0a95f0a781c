"""The estimated cost of a sweep: FLOPs, memory and hours of every run."""

from __future__ import annotations

import heapq
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dinoscale.cluster.doctor.report import count_text
from dinoscale.config.sweep.file import SweepConfig
from dinoscale.errors import ConfigError
from dinoscale.scaling.design.expand import Design, shortened
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.design.requirements import Requirements, require_known_gpu, requirements_of
from dinoscale.scaling.design.resolved_run import dims_of_run
from dinoscale.scaling.number_text import number


def make_plan(sweep: SweepConfig, design: Design) -> dict[str, Any]:
    """Parameters, FLOPs, images, steps, memory and hours of every run, with totals; JSON-able.

    Raises:
        ConfigError: the GPU is unknown, or a run does not fit in its memory.
    """
    cost, executor = sweep.cost, sweep.executor
    require_known_gpu(cost)
    requirements = [requirements_of(run, cost, executor) for run in design.runs]
    problems = [
        f"run {run.name}: {each.problem}"
        for run, each in zip(design.runs, requirements, strict=True)
        if each.problem
    ]
    if problems:
        raise ConfigError(shortened(problems))
    ranks = executor.nodes * executor.processes
    rows = [_as_json(run, each) for run, each in zip(design.runs, requirements, strict=True)]
    hours = [each.hours for each in requirements if each.hours is not None]
    return {
        "out": sweep.out,
        "design": sweep.design,
        "gpu": cost.gpu,
        "ranks": ranks,
        "parallel": executor.parallel,
        "runs": rows,
        "left_out": [asdict(excluded) for excluded in design.left_out],
        "totals": {
            "runs": len(rows),
            "flops": sum(run.flops for run in design.runs),
            "images": sum(run.images for run in design.runs),
            "rank_hours": ranks * sum(hours) if hours else None,
            "hours": _wall_hours(hours, parallel=executor.parallel) if hours else None,
        },
        "assumptions": [*design.notes, *_assumptions(sweep, hours)],
    }


def _as_json(run: PlannedRun, requirements: Requirements) -> dict[str, Any]:
    config, dims = run.config, dims_of_run(run.config)
    return {
        "name": run.name,
        "key": run.key,
        "axes": dict(run.axes),
        "embed_dim": dims.embed_dim,
        "depth": dims.depth,
        "num_heads": dims.num_heads,
        "parameters": run.parameters,
        "flops_per_image": run.flops_per_image,
        "flops": run.flops,
        "images": run.images,
        "distinct_images": run.distinct_images,
        "epochs": config.train.epochs,
        "steps": run.steps,
        "batch_size": config.train.batch_size,
        "peak_lr": config.peak_lr,
        "momentum": config.initial_momentum,
        "weight_decay": list(config.weight_decay_ends),
        "warmup_epochs": config.warmup_epochs,
        "micro_batch_size": requirements.micro_batch_size,
        "memory_bytes": requirements.memory_bytes,
        "hours": requirements.hours,
    }


def _wall_hours(hours: Sequence[float], *, parallel: int) -> float:
    """Hours until the last run ends, if each starts, in order, as soon as a slot is free."""
    busy = [0.0] * min(parallel, len(hours))
    for each in hours:
        heapq.heapreplace(busy, busy[0] + each)
    return max(busy)


def _assumptions(sweep: SweepConfig, hours: Sequence[float]) -> list[str]:
    cost, sentences = sweep.cost, []
    if cost.gpu is not None:
        sentences.append(
            f"{cost.utilization:.0%} of the published FLOP/s of a {cost.gpu} (cost.utilization);"
            " no waiting for data; memory as estimated by `dinoscale plan`"
        )
    elif cost.flops_per_s is not None:
        sentences.append(f"{cost.flops_per_s / 1e9:,.4g} GFLOP/s per rank (cost.flops_per_s)")
    else:
        sentences.append(
            "no hours: set cost.gpu, or cost.flops_per_s to the speed measured in a run"
        )
    if cost.gpu is None:
        sentences.append("GB count the tensors of a rank, without the process itself")
    if hours:
        sentences.append("times count training steps only, not startup, evaluation or queueing")
    limit = sweep.executor.slurm.hours
    longer = sum(each > limit for each in hours)
    if sweep.executor.kind != "local" and longer:
        sentences.append(
            f"{longer} of the runs take longer than the {limit:g} h of executor.slurm.hours"
        )
    return sentences


def as_text(plan: dict[str, Any]) -> str:
    """The plan as text."""
    rows = [_HEAD, *(_row(run) for run in plan["runs"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    shown = [column for column in range(len(_HEAD)) if any(row[column] for row in rows[1:])]
    lines = [
        "  ".join(
            row[column].rjust(widths[column]) if column else row[column].ljust(widths[column])
            for column in shown
        )
        for row in rows
    ]
    sections = [[f"{plan['design']} in {plan['out']}", ""], lines, *_left_out(plan), _sum(plan)]
    notes = ["assumed:", *(_wrapped(text) for text in plan["assumptions"])]
    return "\n".join(line for part in [*sections, ["", *notes]] for line in part) + "\n"


_HEAD = (
    *("run", "params", "FLOPs", "images", "distinct", "steps", "batch"),
    *("peak lr", "momentum", "micro", "GB", "time"),
)


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    return (
        run["name"],
        number(run["parameters"]),
        f"{run['flops']:.2e}".replace("e+", "e"),
        number(run["images"]),
        number(run["distinct_images"]),
        f"{run['steps']:,}",
        f"{run['batch_size']:,}",
        f"{run['peak_lr']:.3g}",
        f"{run['momentum']:.5g}",
        "" if run["micro_batch_size"] is None else str(run["micro_batch_size"]),
        "" if run["memory_bytes"] is None else _gb(run["memory_bytes"]),
        "" if run["hours"] is None else _time(run["hours"]),
    )


def _left_out(plan: dict[str, Any]) -> list[list[str]]:
    if not plan["left_out"]:
        return []
    lines = [
        f"  {run['name']}: {number(run['images'])} images, {run['why']}" for run in plan["left_out"]
    ]
    return [["", "left out:", *lines]]


def _sum(plan: dict[str, Any]) -> list[str]:
    totals = plan["totals"]
    lines = [
        "",
        f"{totals['runs']} runs, {totals['flops']:.3g} FLOPs,"
        f" {number(totals['images'])} images seen",
    ]
    if totals["hours"] is not None:
        rank = "GPU" if plan["gpu"] else "rank"
        lines.append(
            f"{_time(totals['rank_hours'])} of {rank} time, {count_text(plan['ranks'], rank)} per"
            f" run; {_time(totals['hours'])} in all with {count_text(plan['parallel'], 'run')} at a"
            " time"
        )
    return lines


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="    ")


def _time(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours:,.0f} h"


def _gb(size: float | None) -> str:
    return "?" if size is None else f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.3f}"
