"""bfloat16 layers that upcast for the product give what bfloat16 layers give."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinoscale.models import cpu_bf16
from dinoscale.models.activation_checkpointing import Recompute, checkpointed


@pytest.fixture(autouse=True)
def _without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_bf16, "LACKS_BFLOAT16", True)


def _of(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Result, and gradients by all inputs of a sum with uneven weights."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    slope = torch.linspace(-1, 1, result.numel()).view_as(result).bfloat16().to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, slope)]


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def _tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


FACTORS = ((6, 5, 48), (32, 48), (32,))
HEADS = ((3, 2, 17, 16),) * 3


@pytest.mark.parametrize(
    ("ours", "torchs", "shapes"),
    [
        (cpu_bf16.linear, F.linear, FACTORS),
        (cpu_bf16.attention, F.scaled_dot_product_attention, HEADS),
    ],
)
def test_results_and_gradients_are_rounded_once(
    ours: Callable[..., Tensor], torchs: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]
) -> None:
    inputs = _tensors(*shapes)
    truth = _of(torchs, *(x.double() for x in inputs))
    plain = _of(torchs, *inputs)
    for found, of_torch, exact in zip(_of(ours, *inputs), plain, truth, strict=True):
        assert found.dtype is torch.bfloat16
        assert found.shape == exact.shape
        # Rounding once costs 2**-9 at most; attention also rounds its result before the backward.
        assert _error(found, exact) < 1.05 * _error(of_torch, exact) < 0.005


def test_a_layer_without_bias_and_a_frozen_one_have_their_gradients_only() -> None:
    x, weight, bias = _tensors(*FACTORS)
    assert len(_of(lambda a, b: cpu_bf16.linear(a, b, None), x, weight)) == 3
    weight.requires_grad_()
    cpu_bf16.linear(x, weight, bias).sum().backward()
    assert weight.grad is not None
    assert bias.grad is None


def test_only_bfloat16_on_a_cpu_without_it_is_upcast(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = _tensors(*FACTORS)

    def widens(*inputs: Tensor) -> bool:
        with _Calls() as calls:
            cpu_bf16.linear(*inputs)
        return bool(calls.counts)

    assert widens(x, weight, bias)
    assert not widens(x.float(), weight.float(), bias.float())
    monkeypatch.setattr(cpu_bf16, "LACKS_BFLOAT16", False)
    assert not widens(x, weight, bias)


def test_upcasting_a_network_keeps_its_names_and_weights() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Sequential(nn.Linear(3, 2)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cpu_bf16.upcast_linear(network)
    assert [type(m) for m in network.modules() if isinstance(m, nn.Linear)] == [cpu_bf16.Linear] * 2
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class _Calls(TorchDispatchMode):
    """Counts our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dinoscale":
            self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("what", "linears", "attentions"),
    [("pointwise", 1, 1), ("all_but_attention", 2, 1), ("block", 2, 2)],
)
def test_the_backward_pass_recomputes_what_was_not_kept(
    what: Recompute, linears: int, attentions: int
) -> None:
    def work(x: Tensor, w: Tensor) -> Tensor:
        attended = cpu_bf16.attention(x, x, x)
        return F.gelu(cpu_bf16.linear(F.gelu(attended), w, None))

    inputs = _tensors((2, 2, 9, 16), (32, 16))
    plain = _of(work, *inputs)
    with _Calls() as calls:
        recomputing = _of(lambda x, w: checkpointed(what, work, x, w), *inputs)
    assert calls.counts == {"linear": linears, "attention": attentions}
    for found, truth in zip(recomputing, plain, strict=True):
        assert torch.equal(found, truth)
