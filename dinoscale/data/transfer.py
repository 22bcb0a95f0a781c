"""From host memory to the device, beside what the device computes."""

import functools
from collections.abc import Sequence

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


class Staged:
    """Copies of large float tensors from host memory, again and again to tensors of another type.

    One cast of the host and one copy for each tensor, which nobody waits for: copied directly,
    each would be sent in its own type and be waited for.
    """

    def __init__(self) -> None:
        """Take no memory yet."""
        self._pinned: list[Tensor] = []
        self._sent: torch.cuda.Event | None = None

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Begin to copy each source to its target; what the device does next comes after.

        Args:
            targets: on one device.
            sources: of the same sizes, on that device or on the host; may be changed at once.
        """
        if not targets or targets[0].device == sources[0].device:
            if targets:
                torch._foreach_copy_(list(targets), list(sources))
            return
        on_gpu = targets[0].is_cuda
        if self._sent is not None:
            self._sent.synchronize()  # the copies of the time before, long done
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
