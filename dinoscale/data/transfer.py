"""From host memory to the device, beside what the device computes."""

import functools

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of host memory on the device; one that has left host memory, itself.

    On a GPU the copy has a stream of its own, so that it need not wait for the step that runs, and
    starts from pinned memory, so that the host need not wait for the copy.
    """
    if tensor.device.type != "cpu":  # only host memory can be pinned
        return tensor
    if device.type != "cuda":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    beside, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        moved = pinned.to(device, non_blocking=True)
    current.wait_stream(beside)
    moved.record_stream(current)  # its memory is not given out again before that is done with it
    return moved


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
