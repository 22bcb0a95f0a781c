"""Precision of float32 matrix products on a GPU, set in one place at the start.

A GPU may round the factors to TF32, 11 bits of 24. torch allows that for cuDNN's convolutions by
default, and some containers for all products; it has two interfaces to change it, and raises where
they contradict each other.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def exact_float32() -> None:
    """Turn TF32 off in the whole process, whatever the environment or a library has set."""
    torch.set_float32_matmul_precision("highest")  # the one call that sets both interfaces
    cudnn = torch.backends.cudnn
    cudnn.allow_tf32 = False
    for operators in ("conv", "rnn"):  # from torch 2.9 on
        if hasattr(cudnn, operators):
            getattr(cudnn, operators).fp32_precision = "ieee"


@contextmanager
def tensor_cores(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let the float32 products of a bf16 network, those of its prototypes, run as TF32 on a GPU.

    TF32 keeps 11 bits of a factor, 3 more than the prototypes have in bf16 and as many as the
    logits of the authors' float16 autocast; plain float32 would be some ten times slower. Products
    outside the network, such as the blur of the crops and k-NN, and a float32 network stay exact.
    """
    if dtype is not torch.bfloat16 or device.type != "cuda":
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
