"""The highest FLOP/s that this device reaches: those of large matrix products."""

import time
from collections.abc import Iterable

import torch

_RUNS = 5
_LONG_S = 0.5  # a slower product runs only once
_SQUARE = {"cpu": 1024, "cuda": 8192}  # rows of a product that fills the device


def matmul_rates(
    device: torch.device, dtypes: Iterable[torch.dtype], *, tokens: int, embed_dim: int
) -> dict[torch.dtype, float]:
    """FLOP/s by dtype of the fastest of a square product and the two products of the MLP.

    The best of some runs counts. The largest rate is the ceiling of a step: on a CPU without
    bfloat16 instructions float32 products are faster, and `models.cpu_bf16` uses them.

    Args:
        device: to measure.
        dtypes: of the factors.
        tokens: rows of the student's matrices, the tokens of a micro-batch; fewer are measured on a
            CPU, which needs less to be busy.
        embed_dim: width of the backbone; the MLP is four times as wide.
    """
    side, wide = _SQUARE[device.type], 4 * embed_dim
    rows = min(tokens, side) if device.type == "cpu" else tokens
    shapes = ((side, side, side), (rows, embed_dim, wide), (rows, wide, embed_dim))
    return {
        dtype: max(_product_flops(shape, device, dtype) for shape in shapes) for dtype in dtypes
    }


def _product_flops(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of (m, k) @ (k, n)."""
    m, k, n = shape
    a, b = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (k, n)))
    out = a @ b
    least = float("inf")
    for _ in range(_RUNS):
        _wait_for(device)
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait_for(device)
        least = min(least, time.perf_counter() - begin)
        if least > _LONG_S:
            break
    return 2 * m * k * n / least


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
