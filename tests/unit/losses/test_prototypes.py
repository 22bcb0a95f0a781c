"""The loss that never stores the logits equals the loss of the logits, gradients included."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses import dino
from dinoscale.losses.dino import dino_loss, dino_loss_of_prototypes
from dinoscale.planning.bench.tensor_memory import with_peak_bytes

S, B, K, D = 5, 7, 19, 6


def _inputs(*, with_g: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = F.normalize(torch.randn(S * B, D, dtype=dtype), dim=-1).requires_grad_()
    v = torch.randn(K, D, dtype=dtype, requires_grad=True)
    g = torch.rand(K, 1, dtype=dtype).add_(0.5).requires_grad_()
    return (x, v, g) if with_g else (x, v)


def _targets(dtype: torch.dtype = torch.float64, num_teachers: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(num_teachers, B, K, generator=generator, dtype=dtype)
    return (3 * logits).softmax(-1)


def _by_logits(x: Tensor, v: Tensor, g: Tensor | None = None, *, targets: Tensor) -> Tensor:
    weight = F.normalize(v, dim=-1) * (1 if g is None else g)
    return dino_loss((x @ weight.T).view(S, B, K), targets, student_temp=0.1)


def _fused(x: Tensor, v: Tensor, g: Tensor | None = None, *, targets: Tensor) -> Tensor:
    return dino_loss_of_prototypes(x, v, g, teacher_probs=targets, student_temp=0.1)[0]


@pytest.mark.parametrize("with_g", [False, True])
@pytest.mark.parametrize("num_teachers", [2, 3])
@pytest.mark.parametrize("chunk", [1, 3 * S * B, 2**22])  # one prototype, three, all at once
def test_equals_the_loss_of_the_logits(
    monkeypatch: pytest.MonkeyPatch, *, with_g: bool, num_teachers: int, chunk: int
) -> None:
    monkeypatch.setattr(dino, "CHUNK", chunk)
    inputs, targets = _inputs(with_g=with_g), _targets(num_teachers=num_teachers)
    ours, expected = _fused(*inputs, targets=targets), _by_logits(*inputs, targets=targets)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    of_ours = torch.autograd.grad(3 * ours, inputs)  # as accumulation scales it
    for gradient, wanted in zip(of_ours, torch.autograd.grad(3 * expected, inputs), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("with_g", [False, True])
def test_gradients_are_those_of_finite_differences(*, with_g: bool) -> None:
    assert torch.autograd.gradcheck(
        partial(_fused, targets=_targets()), _inputs(with_g=with_g), atol=1e-6
    )


def test_bf16_prototypes_are_computed_in_float32() -> None:
    x, v = (leaf.detach() for leaf in _inputs(with_g=False, dtype=torch.float32))
    v, targets = v.bfloat16().requires_grad_(), _targets(torch.float32)
    loss = _fused(x, v, targets=targets)
    (gradient,) = torch.autograd.grad(loss, v)
    exact = v.detach().float().requires_grad_()
    expected = _by_logits(x, exact, targets=targets)
    (wanted,) = torch.autograd.grad(expected, exact)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wanted.bfloat16(), rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("spread", [0.2, 0.01])
def test_sharp_agreement_costs_no_more_digits_than_plain_torch(spread: float) -> None:
    """If student and teacher agree on one prototype, gradients are differences of near equals."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(64, 16, generator=generator)
    centers = F.normalize(v, dim=-1)[:B].repeat(S, 1)
    noise = torch.randn(S * B, 16, generator=generator)
    x = F.normalize(centers + spread * noise, dim=-1)
    g = torch.full((64, 1), 3.0)
    targets = (25 * x[: 2 * B] @ F.normalize(v, dim=-1).T).softmax(-1).view(2, B, 64)

    def gradients(dtype: torch.dtype, *, ours: bool) -> tuple[Tensor, ...]:
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (x, v, g)]
        if ours:
            return torch.autograd.grad(_fused(*leaves, targets=targets.to(dtype)), leaves)
        weight = F.normalize(leaves[1], dim=-1) * leaves[2]
        log_q = ((leaves[0] @ weight.T).view(S, B, 64) / 0.1).log_softmax(-1)
        pairs = [(s, t) for s in range(S) for t in range(2) if s != t]
        loss = -sum((targets[t].to(dtype) * log_q[s]).sum() for s, t in pairs)
        return torch.autograd.grad(loss / (len(pairs) * B), leaves)

    exact = gradients(torch.float64, ours=False)
    ours, plain = gradients(torch.float32, ours=True), gradients(torch.float32, ours=False)
    for found, by_torch, truth in zip(ours, plain, exact, strict=True):
        assert (found - truth).norm() < 3 * (by_torch - truth).norm()


def test_a_second_backward_gives_the_same_gradients() -> None:
    inputs = _inputs(with_g=True)
    loss = _fused(*inputs, targets=_targets())
    first = torch.autograd.grad(2 * loss, inputs, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(2 * loss, inputs), strict=True):
        assert torch.equal(one, two)


def test_without_gradients_only_the_loss_is_computed() -> None:
    inputs = _inputs(with_g=True)
    with torch.no_grad():
        loss = _fused(*inputs, targets=_targets())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, _fused(*inputs, targets=_targets()).detach())


def test_rows_that_are_not_whole_crops_are_refused() -> None:
    x, v = _inputs(with_g=False)
    with pytest.raises(ValueError, match="whole crops"):
        _fused(x[:-1], v, targets=_targets())


def _peak(num_crops: int) -> int:
    """Bytes of a loss with its gradients beyond its inputs, 64 images, 2**15 prototypes."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(num_crops * 64, 8), dim=-1).requires_grad_()
    v = torch.randn(2**15, 8, requires_grad=True)
    targets = torch.randn(2, 64, 2**15).softmax(-1)
    inputs = sum(4 * tensor.numel() for tensor in (x, v, targets))

    def work() -> None:
        dino_loss_of_prototypes(x, v, None, teacher_probs=targets, student_temp=0.1)[0].backward()

    return with_peak_bytes(work)[1] - inputs


def test_memory_does_not_grow_with_the_crops() -> None:
    logits_of_10_more = 4 * 10 * 64 * 2**15
    few, many = _peak(16), _peak(26)
    assert many - few < 0.1 * logits_of_10_more
