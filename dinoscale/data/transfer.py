"""Copies from host memory to the device that overlap with its computation."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor in host memory to the device; return any other tensor as it is.

    On a GPU the copy runs on a stream of its own, so it does not wait for the current step, and
    from pinned memory, so the host does not wait for the copy.
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
    moved.record_stream(current)  # its memory is not reused before `current` is done with it
    return moved


class StagingBuffers:
    """Pinned buffers for repeated copies of large float tensors from host memory to another dtype.

    Each tensor takes one cast on the host and one asynchronous copy. A direct copy would send the
    source dtype, and the host would wait for it.
    """

    def __init__(self) -> None:
        """Allocate no memory yet."""
        self._pinned: list[Tensor] = []
        self._sent: torch.cuda.Event | None = None

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Start copying each source to its target; later work on the device comes after the copy.

        Args:
            targets: on one device.
            sources: tensors of the same sizes, on that device or the host; may be changed at once.
        """
        if not targets or targets[0].device == sources[0].device:
            if targets:
                torch._foreach_copy_(list(targets), list(sources))
            return
        on_gpu = targets[0].is_cuda
        if self._sent is not None:
            self._sent.synchronize()  # the previous copies, long done
        if not self._pinned:
            self._pinned = [
                torch.empty(target.shape, dtype=target.dtype, pin_memory=on_gpu)
                for target in targets
            ]
        for target, pinned, source in zip(targets, self._pinned, sources, strict=True):
            pinned.copy_(source)
            target.copy_(pinned, non_blocking=True)
        if on_gpu:
            self._sent = torch.cuda.Event()
            self._sent.record()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
