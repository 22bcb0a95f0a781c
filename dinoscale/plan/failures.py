"""What a large cluster adds: starting, saving, failing, and what is lost by that."""

import math
from dataclasses import dataclass

from dinoscale.dims import Dims
from dinoscale.plan.setup import FP32, Setup

# 419 unexpected interruptions in 54 days on 16,384 GPUs (The Llama 3 Herd of Models,
# arXiv:2407.21783, section 3.3.4).
FAILURES_PER_GPU_DAY = 419 / (54 * 16_384)
DAY_S = 86_400
# Measured for a ViT-L on one core of a server's CPU, random numbers included.
BUILT_PER_S = 130e6  # weights


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
        lost_share: of all work, by failures and saving.
    """

    host_bytes: float
    build_s: float
    checkpoint_bytes: float
    write_s: float
    failures_per_day: float
    interval_s: float
    lost_share: float


def durability(dims: Dims, setup: Setup, *, storage: float) -> Durability:
    """Expect failures at the published rate and save as often as pays.

    The interval is that of Young and Daly, sqrt(2 C M), with M the mean time between failures and
    C what a checkpoint costs (Young 1974, doi:10.1145/361147.361115; Daly 2006,
    doi:10.1016/j.future.2004.11.016). C is taken as the whole time of writing, too much on purpose:
    training stands still only while a rank copies its part to memory. A failure loses half an
    interval, and a restart: building and reading.

    Args:
        dims: of the network.
        setup: of the run.
        storage: bytes/s that all ranks together write or read.
    """
    saved = FP32 * (2 + setup.moments) * dims.parameters  # master, average and moments
    write_s = saved / storage
    build_s = dims.parameters / BUILT_PER_S
    failures = FAILURES_PER_GPU_DAY * setup.world_size
    between_s = DAY_S / failures
    interval_s = math.sqrt(2 * write_s * between_s)
    lost_s = interval_s / 2 + build_s + write_s
    return Durability(
        host_bytes=FP32 * dims.largest,
        build_s=build_s,
        checkpoint_bytes=saved,
        write_s=write_s,
        failures_per_day=failures,
        interval_s=interval_s,
        lost_share=lost_s / between_s + write_s / interval_s,
    )
