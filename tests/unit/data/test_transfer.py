"""What goes to the device goes once."""

import torch

from dinoscale.data.transfer import to_device


def test_a_tensor_that_has_left_host_memory_is_not_pinned() -> None:
    there = torch.empty(3, device="meta")  # refuses to be pinned, as a GPU's tensors do
    assert to_device(there, torch.device("cuda")) is there


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
