"""Measure which precision is faster on this machine."""

import logging
import time

import torch

from dinoscale.models.cpu_bf16 import linear

log = logging.getLogger(__name__)


# Rows and width of the timed layer; on a GPU large enough that launching it takes negligible time.
_SIZES = {"cpu": (2048, 256), "cuda": (8192, 2048)}


def product_flops(device: str) -> int:
    """FLOPs of the product that `matrix_product_s` times on a device type."""
    rows, width = _SIZES[device]
    return 2 * rows * rows * width


def matrix_product_s() -> dict[str, float]:
    """Precision -> seconds of one linear layer on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.ones(*_SIZES[device.type], device=device, dtype=dtype)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            linear(a, a, None).sum().item()  # waits for the device
            times.append(time.perf_counter() - begin)
        seconds[name] = min(times)
    return seconds


def fastest_precision() -> str:
    """bf16, unless float32 layers are faster, as on CPUs without bf16 instructions."""
    seconds = matrix_product_s()
    log.info("matrix product: bf16 %.1f ms, fp32 %.1f ms", *(1e3 * s for s in seconds.values()))
    return min(seconds, key=lambda name: seconds[name])
