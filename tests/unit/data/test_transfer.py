"""Copies to the device, with the meta device in its place."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinoscale.data.transfer import StagingBuffers, to_device


class _Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, str, bool]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::copy_":
            target, source, *non_blocking = args
            casts = target.dtype != source.dtype
            waits = target.device != source.device and not any(non_blocking)
            self.seen[f"{source.device}>{target.device}", "casts" if casts else "", waits] += 1
        return func(*args, **(kwargs or {}))


def test_large_tensors_are_cast_by_the_host_and_sent_by_one_copy_that_nobody_waits_for() -> None:
    staged = StagingBuffers()
    averages = [torch.rand(64), torch.rand(8)]
    targets = [
        torch.empty(64, dtype=torch.bfloat16, device="meta"),
        torch.empty(8, dtype=torch.bfloat16, device="meta"),
    ]
    for _ in range(3):
        with _Copies() as copies:
            staged.copy(targets, averages)
        assert copies.seen == {("cpu>cpu", "casts", False): 2, ("cpu>meta", "", False): 2}
    kept = [pinned.data_ptr() for pinned in staged._pinned]
    staged.copy(targets, averages)
    assert [pinned.data_ptr() for pinned in staged._pinned] == kept
    assert torch.equal(staged._pinned[0], averages[0].bfloat16())


def test_on_one_device_nothing_is_staged() -> None:
    staged, target = StagingBuffers(), torch.zeros(4, dtype=torch.bfloat16)
    staged.copy([target], [torch.ones(4)])
    assert torch.equal(target, torch.ones(4, dtype=torch.bfloat16))
    assert staged._pinned == []
    staged.copy([], [])


def test_a_tensor_that_has_left_host_memory_is_not_pinned() -> None:
    there = torch.empty(3, device="meta")  # refuses to be pinned, as a GPU's tensors do
    assert to_device(there, torch.device("cuda")) is there


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
