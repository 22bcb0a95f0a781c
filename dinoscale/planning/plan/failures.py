"""What a large cluster adds: starting, saving, failing, and what is lost by that."""

import math
from dataclasses import dataclass

from dinoscale.engine.model_sizes import Dims
from dinoscale.planning.plan.partition import FP32, Setup

# 419 unexpected interruptions in 54 days on 16,384 GPUs (The Llama 3 Herd of Models,
# arXiv:2407.21783, section 3.3.4).
FAILURES_PER_GPU_DAY = 419 / (54 * 16_384)
DAY_S = 86_400
# Measured for a ViT-L on one core of a server's CPU, random numbers included.
BUILT_PER_S = 130e6  # weights


@dataclass(frozen=True)
class Restart:
    """What passes between a failure and the next step, in seconds; the defaults are judgement.

    Attributes:
        hang_s: until a failure is noticed that breaks no connection.
        requeue_s: until the machines, or others in their place, are there again.
        start_s: until Python and its libraries are loaded and the ranks have met.
        index_s: until the images are listed, or their index is read.
    """

    hang_s: float = 1800.0
    requeue_s: float = 300.0
    start_s: float = 120.0
    index_s: float = 30.0


USUAL = Restart()


@dataclass(frozen=True)
class Durability:
    """Start, checkpoints and failures of a run.

    Attributes:
        host_bytes: of host memory that each rank takes at the start for the tensor being drawn.
        build_s: seconds for that.
        checkpoint_bytes: of all ranks.
        write_s: seconds to write or read one.
        failures_per_day: that end the run, expected.
        interval_s: between checkpoints.
        restart_s: from a failure that is noticed at once to the next step.
        lost_share: of the time, expected, where failures are noticed at once.
        most_lost_share: the same where each happens just before a checkpoint is complete and is
            noticed at the time-out; of so many failures no more can be lost.
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


def durability(dims: Dims, setup: Setup, *, storage: float, restart: Restart = USUAL) -> Durability:
    """Expect failures at the published rate and save as often as pays.

    The interval is that of Young and Daly, sqrt(2 C M), with M the mean time between failures and
    C what a checkpoint costs (Young 1974, doi:10.1145/361147.361115; Daly 2006,
    doi:10.1016/j.future.2004.11.016). C is taken as the whole time of writing, too much on purpose:
    training stands still only while a rank copies its part to memory. A failure loses the steps
    since the last complete checkpoint, which are half an interval and its writing, and the restart,
    which reads one.

    Args:
        dims: of the network.
        setup: of the run.
        storage: bytes/s that all ranks together write or read.
        restart: what else a failure costs.
    """
    saved = FP32 * (2 + setup.moments) * dims.parameters  # master, average and moments
    write_s = saved / storage
    build_s = dims.parameters / BUILT_PER_S
    failures = FAILURES_PER_GPU_DAY * setup.world_size
    between_s = DAY_S / failures
    interval_s = math.sqrt(2 * write_s * between_s)
    restart_s = restart.requeue_s + restart.start_s + restart.index_s + write_s
    saving = write_s / interval_s
    return Durability(
        host_bytes=FP32 * dims.largest,
        build_s=build_s,
        checkpoint_bytes=saved,
        write_s=write_s,
        failures_per_day=failures,
        interval_s=interval_s,
        restart_s=restart_s,
        lost_share=(interval_s / 2 + write_s + restart_s) / between_s + saving,
        most_lost_share=(interval_s + write_s + restart.hang_s + restart_s) / between_s + saving,
    )
