"""The teacher at step 0, as the ranks hold it, against the network that a run starts from."""

import logging
import math
from pathlib import Path
from typing import Literal

from dinoscale.config import RunConfig
from dinoscale.convert.step_zero import relative_difference
from dinoscale.engine.build import StepZero
from dinoscale.engine.teacher import Teacher
from dinoscale.errors import ConfigError
from dinoscale.runtime import distributed
from dinoscale.training.hooks.events import Events

log = logging.getLogger(__name__)

# All of a class token's length. Eight bits move those of random ViTs of 2 to 12 blocks by 0.005 to
# 0.011; deeper networks and large activations round more, so that above this is a warning.
_USUAL_BF16 = 0.1
# Above this is refused, in any precision and on any device. Tokens of unrelated weights are at
# right angles, sqrt 2 apart. The 80 sums of a residual stream of 40 blocks, each rounded to bf16 by
# 2^-9, are off by 0.16 if all err alike; three times that leaves room for the branches.
_LARGEST = 0.5


def compare_features(config: RunConfig, teacher: Teacher, on_first: StepZero | None) -> None:
    """Record how far the features at step 0 are from those of train.init_from; collective.

    Rank 0 has compared whole weights in float32. Here the teacher, which starts as a copy of the
    student's master weights, sees the same picture through the forward of a step: in the compute
    dtype, gathered as then, without a copy of all weights. Its kernels may round in another way
    than those of rank 0's CPU, whose bound says nothing of them: above that bound is a warning, and
    only what no rounding explains is refused.

    Args:
        config: of the run.
        teacher: before the first step.
        on_first: on rank 0, what the backbone must compute.

    Raises:
        ConfigError: on every rank, if the teacher's features are those of other weights.
    """
    step_zero = distributed.broadcast_object(on_first)
    assert step_zero is not None
    values = {"difference": step_zero.difference, "bound": step_zero.bound}
    precision, sharded = config.engine.precision, 0.0
    usual = _USUAL_BF16 if precision == "bf16" else step_zero.bound
    if step_zero.class_tokens is not None:
        found = teacher.class_tokens(step_zero.pictures).cpu()
        own = relative_difference(found, step_zero.class_tokens)
        of_ranks = distributed.gather_objects(own)
        sharded = max(of_ranks, key=lambda value: (math.isnan(value), value))
        values |= {"sharded_difference": sharded, "sharded_bound": usual, "sharded_limit": _LARGEST}
    source, is_first = config.train.init_from, distributed.rank() == 0
    if is_first:
        told = ", ".join(f"{key} {value:.1e}" for key, value in values.items())
        log.info("features at step 0, compared with those of %s: %s", source, told)
    pixels = list(step_zero.pictures.shape[-2:])
    events = Events(Path(config.run_dir), active=is_first)
    outcome = _outcome(sharded, usual)
    events.write(0, "features compared", source=source, pixels=pixels, outcome=outcome, **values)
    if outcome == "refused":
        other = "engine.precision=fp32" if precision == "bf16" else "another engine.zero_stage"
        raise ConfigError(
            f"train.init_from: the teacher of ZeRO stage {config.engine.zero_stage} does not "
            f"compute the features of {source}, but others that differ by {sharded:.2g} of their "
            f"length, where no rounding explains more than {_LARGEST:g}; set {other}, and report it"
        )
    if outcome == "warned" and is_first:
        log.warning(
            "the teacher's features at step 0 differ from those of %s by %.2g of their length,"
            " more than %s usually rounds (%.1g) and less than other weights would (%g): the run"
            " goes on, and dinoscale evaluate knn of both says whether it matters",
            *(source, sharded, precision, usual, _LARGEST),
        )


def _outcome(sharded: float, usual: float) -> Literal["within rounding", "warned", "refused"]:
    """What becomes of a difference of the sharded teacher's features; NaN is refused."""
    if not sharded <= _LARGEST:
        return "refused"
    return "warned" if sharded > usual else "within rounding"
