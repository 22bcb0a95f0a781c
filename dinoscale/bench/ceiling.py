"""What the device at hand can do at most: products of large matrices."""

import time

import torch

_RUNS = 5
_SQUARE = {"cpu": 1024, "cuda": 8192}  # rows of a product that fills the device


def matmul_ceiling(
    device: torch.device, dtype: torch.dtype, *, tokens: int, embed_dim: int
) -> float:
    """FLOP/s of the fastest of a square product and the products of the MLP, best of some runs.

    Products of float32 count too: on a CPU without bfloat16 instructions they are faster, and
    `models.widened` takes them.

    Args:
        device: to measure.
        dtype: of the factors.
        tokens: rows of the student's matrices, the tokens of a micro-batch.
        embed_dim: width of the backbone; the MLP is four times as wide.
    """
    side, wide = _SQUARE[device.type], 4 * embed_dim
    shapes = ((side, side, side), (tokens, embed_dim, wide), (tokens, wide, embed_dim))
    kinds = {dtype, torch.float32}
    return max(_product_flops(shape, device, kind) for shape in shapes for kind in kinds)


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
    return 2 * m * k * n / least


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
