"""The time that a step waits if the optimizer is offloaded to host memory.

Letters: n weights of a rank's partition, s bytes of a weight in the forward.
"""

from dinoscale.engine.model_sizes import Dims
from dinoscale.planning.plan.partition import FP32, Setup

# Estimates for one GPU while all GPUs of its node do the same; not measured on a GPU.
PCIE = 25e9  # bytes/s one way, of the 32 GB/s of 16 lanes of PCIe 4.0, from page-locked memory
HOST_MEMORY = 20e9  # bytes/s of the update: an eighth of 40% of 410 GB/s, 16 x DDR4-3200


def offload_s(dims: Dims, setup: Setup) -> float:
    """Seconds of a step in which the device waits for the offloaded optimizer; 0 without it.

    Gradients go to the host over PCIe, after every micro-batch at stages 2 and 3, and the weights
    of student and teacher come back. In between the CPU reads and writes gradients, master weights,
    moments and the teacher's EMA, and casts the weights. None of this overlaps with compute.

    Args:
        dims: of the network.
        setup: of the run.
    """
    if not setup.offload_optimizer:
        return 0.0
    own, s = dims.trained / setup.world_size, setup.weight_bytes
    passes = setup.accumulation_steps if setup.zero_stage >= 2 else 1
    gradient = FP32 if setup.sums_in_fp32 else s
    over_pcie = own * (passes * gradient + 2 * s)
    update = gradient + 2 * FP32 * (1 + setup.moments)
    average = FP32 + 2 * FP32
    casts = 2 * (FP32 + s)
    return over_pcie / PCIE + own * (update + average + casts) / HOST_MEMORY
