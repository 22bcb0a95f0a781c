"""The teacher at step 0, as the ranks hold it, against the network that a run starts from."""

import logging
import math
from pathlib import Path

from dinoscale.config import RunConfig
from dinoscale.convert.step_zero import relative_difference
from dinoscale.engine.build import StepZero
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import ConfigError
from dinoscale.runtime import distributed
from dinoscale.training.hooks.events import Events

log = logging.getLogger(__name__)

# Of a class token's length. Eight bits move those of random ViTs of 2 to 12 blocks by 0.005 to
# 0.011; those of another network are 1.4 away. Large activations round more.
_BF16 = 0.25


def compare_features(config: RunConfig, teacher: Teacher, on_first: StepZero | None) -> None:
    """Record how far the features at step 0 are from those of train.init_from; collective.

    Rank 0 has compared whole weights in float32. Here the teacher, which starts as a copy of the
    student's master weights, sees the same picture through the forward of a step: in the compute
    dtype, gathered as then, without a copy of all weights.

    Args:
        config: of the run.
        teacher: before the first step.
        on_first: on rank 0, what the backbone must compute.

    Raises:
        ConfigError: on every rank, if the teacher's features differ by more than rounding explains.
    """
    step_zero = distributed.broadcast_object(on_first)
    assert step_zero is not None
    values = {"difference": step_zero.difference, "bound": step_zero.bound}
    sharded, bound = 0.0, _BF16 if config.engine.precision == "bf16" else step_zero.bound
    if step_zero.class_tokens is not None:
        found = teacher.class_tokens(step_zero.pictures).cpu()
        own = relative_difference(found, step_zero.class_tokens)
        of_ranks = distributed.gather_objects(own)
        sharded = max(of_ranks, key=lambda value: (math.isnan(value), value))
        values |= {"sharded_difference": sharded, "sharded_bound": bound}
    source, is_first = config.train.init_from, distributed.rank() == 0
    if is_first:
        told = ", ".join(f"{key} {value:.1e}" for key, value in values.items())
        log.info("features at step 0, compared with those of %s: %s", source, told)
    pixels = step_zero.pictures.shape[-1]
    events = Events(Path(config.run_dir), active=is_first)
    events.write(0, "features compared", source=source, pixels=pixels, **values)
    if not sharded <= bound:
        raise ConfigError(
            f"train.init_from: the teacher of ZeRO stage {config.engine.zero_stage} does not "
            f"compute the features of {source}, but others that differ by {sharded:.2g} of their "
            f"length, where {config.engine.precision} explains {bound:.1g}; try another "
            "engine.zero_stage, and report it"
        )
