"""Which compute type is fast on this machine."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dinoscale.models.widened import linear

log = logging.getLogger(__name__)


def matrix_product_s() -> dict[str, float]:
    """Seconds of one small linear layer on the device at hand, by name of the precision."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.ones(2048, 256, device=device, dtype=dtype)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            linear(a, a, None).sum().item()  # waits for the device
            times.append(time.perf_counter() - begin)
        seconds[name] = min(times)
    return seconds


def fastest_precision() -> str:
    """bf16, unless float32 layers are faster here, as on CPUs without bf16 instructions."""
    seconds = matrix_product_s()
    log.info("matrix product: bf16 %.1f ms, fp32 %.1f ms", *(1e3 * s for s in seconds.values()))
    return min(seconds, key=lambda name: seconds[name])


@contextmanager
def tensor_cores(dtype: torch.dtype) -> Iterator[None]:
    """Let the float32 products of a bf16 network, those of its prototypes, run as TF32 on a GPU.

    TF32 keeps 11 bits of a factor, 3 more than the prototypes have in bf16 and as many as the
    logits of the authors' float16 autocast; plain float32 would be some ten times slower.
    """
    products = torch.backends.cuda.matmul
    before = products.allow_tf32
    products.allow_tf32 = before or dtype is torch.bfloat16
    try:
        yield
    finally:
        products.allow_tf32 = before
