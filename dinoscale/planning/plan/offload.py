"""What a step waits for where the optimizer states lie in the memory of the machine.

Letters: n scalars of a rank's part, s bytes of a weight in the forward.
"""

from dinoscale.engine.model_sizes import Dims
from dinoscale.planning.plan.partition import FP32, Setup

# Judgement, of one GPU while all of its machine do the same; neither has been measured with one.
PCIE = 25e9  # bytes/s one way, of the 32 GB/s of 16 lanes of PCIe 4.0, from page-locked memory
HOST_MEMORY = 20e9  # bytes/s that the update gets: an eighth of 40% of 410 GB/s, 16 x DDR4-3200


def offload_s(dims: Dims, setup: Setup) -> float:
    """Seconds of a step in which the device waits for the machine's memory; 0 without offloading.

    Gradients come over PCIe, after every micro-batch at stages 2 and 3, and the weights of student
    and teacher go back. Between them the CPU reads and writes gradients, master weights, moments
    and the teacher's average, and casts the weights. Nothing of it runs beside compute.

    Args:
        dims: of the network.
        setup: of the run.
    """
    if not setup.offload_optimizer:
        return 0.0
    own, s = dims.parameters / setup.world_size, setup.weight_bytes
    passes = setup.accumulation_steps if setup.zero_stage >= 2 else 1
    gradient = FP32 if setup.sums_in_fp32 else s
    over_pcie = own * (passes * gradient + 2 * s)
    update = gradient + 2 * FP32 * (1 + setup.moments)
    average = FP32 + 2 * FP32
    casts = 2 * (FP32 + s)
    return over_pcie / PCIE + own * (update + average + casts) / HOST_MEMORY
