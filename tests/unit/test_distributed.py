"""A backend that takes tensors of an accelerator only, as NCCL does, gets nothing else.

No accelerator is needed: the tensors are stand-ins that have a device and no numbers.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dinoscale.runtime import distributed


class RefusingGroup(dist.ProcessGroup):
    """Two ranks, of which this is one; refuses what NCCL refuses, and communicates nothing."""

    def allreduce(self, tensors: list[torch.Tensor], _options: Any) -> Any:
        return self._taken(tensors)

    def _allgather_base(self, whole: torch.Tensor, part: torch.Tensor, _options: Any) -> Any:
        return self._taken([whole, part])

    def _taken(self, tensors: list[torch.Tensor]) -> Any:
        for tensor in tensors:
            if tensor.device.type != "cuda":
                raise RuntimeError(f"No backend type associated with device type {tensor.device}")
        done: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        done.set_result(tensors)
        return torch._C._distributed_c10d._create_work_from_future(done)

    def getBackendName(self) -> str:  # noqa: N802  # torch's name
        return "refusing"


@pytest.fixture(scope="module")
def refusing() -> Iterator[None]:
    """A job on such a backend."""
    dist.Backend.register_backend(
        "refusing", lambda _store, rank, size, _timeout: RefusingGroup(rank, size), devices=["cuda"]
    )
    dist.init_process_group("refusing", store=FakeStore(), rank=0, world_size=2)
    with FakeTensorMode():
        yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensors_go_where_the_backend_takes_them_and_come_back(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RuntimeError, match="No backend type"):
        dist.all_reduce(torch.zeros(3))
    part, whole = torch.zeros(3, device=device), torch.zeros(6, device=device)
    assert distributed.all_reduce_sum(part) is part
    distributed.all_gather_flat(whole, part)
    assert {part.device.type, whole.device.type} == {device}


@pytest.mark.usefixtures("refusing")
def test_gradient_of_a_sum_uses_the_device_of_the_backend_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    part = torch.zeros(3, requires_grad=True)
    summed = distributed.sum_with_gradient(part)
    summed.sum().backward()
    assert part.grad is not None
    assert {summed.device.type, part.grad.device.type} == {"cpu"}
