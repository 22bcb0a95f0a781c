"""The start, checkpoints and failures of a run on many GPUs, and the time they cost."""

import math
from dataclasses import dataclass

from dinoscale.engine.model_sizes import Dims
from dinoscale.planning.plan.partition import FP32, Setup

# 419 unexpected interruptions in 54 days on 16,384 GPUs (The Llama 3 Herd of Models,
# arXiv:2407.21783, section 3.3.4).
FAILURES_PER_GPU_DAY = 419 / (54 * 16_384)
DAY_S = 86_400
# Measured for a ViT-L on one core of a server's CPU, random numbers included.
WEIGHTS_DRAWN_PER_S = 130e6


@dataclass(frozen=True)
class Restart:
    """Seconds of each stage between a failure and the next step; the defaults are estimates.

    Attributes:
        hang_s: until a failure that breaks no connection is noticed.
        requeue_s: until the nodes, or replacements, are available.
        start_s: until Python and its libraries are loaded and the ranks have met.
        index_s: until the images are listed, or their index is read.
    """

    hang_s: float = 1800.0
    requeue_s: float = 300.0
    start_s: float = 120.0
    index_s: float = 30.0


DEFAULT_RESTART = Restart()


@dataclass(frozen=True)
class Durability:
    """Start, checkpoints and failures of a run.

    Attributes:
        host_bytes: host memory of each rank at the start, for the tensor being drawn and its slices
            of weights that do not train.
        build_s: seconds to draw all weights.
        checkpoint_bytes: size of a checkpoint, over all ranks.
        write_s: seconds to write or read a checkpoint.
        failures_per_day: expected number of failures that end the run.
        interval_s: seconds between checkpoints.
        restart_s: seconds from a failure, noticed at once, to the next step.
        lost_share: expected share of the time that is lost, if failures are noticed at once.
        most_lost_share: the worst case for this number of failures: each happens just before a
            checkpoint is complete, and is noticed only at the time-out.
    """

    host_bytes: float
    build_s: float
    checkpoint_bytes: float
    write_s: float
    failures_per_day: float
    interval_s: float
    restart_s: float
    lost_share: float
    most_lost_share: float


def durability(
    dims: Dims, setup: Setup, *, storage: float, restart: Restart = DEFAULT_RESTART
) -> Durability:
    """Choose the checkpoint interval for the published failure rate, and predict the lost time.

    The interval is that of Young and Daly, sqrt(2 C M), with M the mean time between failures and
    C the cost of a checkpoint (Young 1974, doi:10.1145/361147.361115; Daly 2006,
    doi:10.1016/j.future.2004.11.016). C is the whole time of writing, which overestimates on
    purpose: training pauses only while a rank copies its part to memory. A failure loses the steps
    since the last complete checkpoint, on average half an interval and the time of writing, and
    the time of the restart, which reads a checkpoint.

    Args:
        dims: of the network.
        setup: of the run.
        storage: bytes/s that all ranks together write or read.
        restart: the other costs of a failure.
    """
    saved = FP32 * (2 + setup.moments) * dims.trained  # master weights, EMA and moments
    saved += FP32 * (dims.frozen + (dims.backbone - dims.frozen) * dims.frozen_networks)
    write_s = saved / storage
    teacher = dims.frozen_teacher or dims.followed
    of_teacher = 0 if teacher is None else teacher.parameters
    build_s = dims.parameters / WEIGHTS_DRAWN_PER_S
    failures = FAILURES_PER_GPU_DAY * setup.world_size
    between_s = DAY_S / failures
    interval_s = math.sqrt(2 * write_s * between_s)
    restart_s = restart.requeue_s + restart.start_s + restart.index_s + write_s
    saving = write_s / interval_s
    return Durability(
        host_bytes=FP32 * (dims.largest + dims.frozen / setup.world_size + of_teacher),
        build_s=build_s,
        checkpoint_bytes=saved,
        write_s=write_s,
        failures_per_day=failures,
        interval_s=interval_s,
        restart_s=restart_s,
        lost_share=(interval_s / 2 + write_s + restart_s) / between_s + saving,
        most_lost_share=(interval_s + write_s + restart.hang_s + restart_s) / between_s + saving,
    )
