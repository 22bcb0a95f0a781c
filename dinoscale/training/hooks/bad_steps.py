"""Write what is known of a skipped step to a file: images and losses of every rank."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from dinoscale.data.loader import Batch
from dinoscale.data.sources.source import Source
from dinoscale.engine.step import StepMetrics
from dinoscale.runtime import distributed

log = logging.getLogger(__name__)


def dump_bad_step(
    run_dir: Path, step: int, result: StepMetrics, batches: Sequence[Batch], source: Source
) -> Path:
    """Write `run_dir`/bad_steps/step_XXXXXXXX.json; collective.

    Per rank and micro-batch: sample ids, their paths, and the numbers of `StepMetrics.parts`, as
    text where they are not finite ("nan", "inf"), which JSON cannot represent.

    Returns:
        The file. It is missing if rank 0 could not write it, which does not end the run.
    """
    own = [
        {
            **{name: _number(value) for name, value in numbers.items()},
            "sample_ids": batch.sample_ids.tolist(),
            "paths": [source.path(int(sample)) for sample in batch.sample_ids],
        }
        for numbers, batch in zip(result.parts, batches, strict=True)
    ]
    of_ranks = distributed.gather_objects(own)
    path = run_dir / "bad_steps" / f"step_{step:08d}.json"
    if distributed.rank() == 0:
        found = {"step": step, "reason": result.skipped, "ranks": of_ranks}
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            log.warning("cannot write %s: %s", path, error)
    return path


def _number(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)
