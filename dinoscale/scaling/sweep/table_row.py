"""Convert a run that ended into a row of the table."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from dinoscale.config.sections.backbones import named_vit_size
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.sweep.run_files import Job, Result
from dinoscale.scaling.sweep.table import Row


def row_of(
    run: PlannedRun,
    job: Job,
    result: Result,
    *,
    metrics: Mapping[str, float | None],
    lines: Mapping[str, str] | None = None,
    prints: Mapping[str, Any] | None = None,
    error: str = "",
) -> Row:
    """The row of a run.

    Args:
        run: the run as planned.
        job: its job, with all failures counted.
        result: result of its last attempt.
        metrics: metrics by name; None where there is no value.
        lines: metric -> line that measured it; None for those of the result.
        prints: metric -> fingerprint of what it was measured on; None for those of the result.
        error: why it failed, else empty. A run whose training is complete is done all the same.
    """
    config = run.config
    named = named_vit_size(config.model.backbone)
    return Row(
        key=run.key,
        name=run.name,
        status="done" if result.trained else "failed",
        ended=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        attempts=job.failures + (not error),
        parameters=run.parameters,
        flops_per_image=run.flops_per_image,
        images=run.images,
        distinct_images=min(run.distinct_images, result.num_images or run.distinct_images),
        steps=run.steps,
        flops=run.flops,
        embed_dim=config.model.embed_dim or (named.embed_dim if named else None),
        depth=config.model.depth or (named.depth if named else None),
        batch_size=config.train.batch_size,
        lr=config.peak_lr,
        seed=config.seed,
        seconds=round(result.seconds, 1),
        ranks=job.nodes * job.processes,
        metrics=metrics,
        curves=result.curves,
        axes=run.axes,
        config=config.model_dump(mode="json"),
        versions=result.versions,
        error=error,
        lines=result.lines if lines is None else lines,
        prints=result.prints if prints is None else prints,
        events=result.events,
        rules=run.rules,
    )
