"""Peak memory of tensors during some work, measured by the allocator on GPUs and CPUs.

On a CPU the resident memory of a process says little about tensors: the C library keeps freed
memory, and libraries and threads take their share.
"""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")

_WITHOUT_STORAGE = (FakeTensor, FunctionalTensor)  # left over from traces of the compiler


def with_peak_bytes(work: Callable[[], Result]) -> tuple[Result, int]:
    """Do `work`, and measure the peak bytes of all tensors of this process.

    On a CPU the profiler records every allocation, which takes time: do not time the work as well.
    Earlier tensors that no Python object refers to are then not counted.

    Returns:
        The result of `work`, and the largest sum of bytes of the storages alive at one moment.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated()
    before = live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, nbytes in changes:
        now += nbytes
        peak = max(peak, now)
    return result, before + peak


def live_bytes() -> int:
    """Bytes of the storages of all CPU tensors that Python objects refer to."""
    gc.collect()
    # By type: isinstance would trigger the lazy objects that modules hold.
    tensors = (
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), Tensor) and not issubclass(type(thing), _WITHOUT_STORAGE)
    )
    storages = (t.untyped_storage() for t in tensors if t.device.type == "cpu" and not t.is_sparse)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
