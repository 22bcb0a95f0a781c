"""The patch loss that stores no logits equals cross-entropy by plain torch, gradients included."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses import ibot
from dinoscale.losses.ibot import PatchTargets, patch_loss_of_prototypes
from dinoscale.planning.bench.tensor_memory import live_bytes, with_peak_bytes

M, K, D, T = 13, 17, 6, 5  # patches, prototypes, widths of student and teacher
TAU = 0.1


def _student(*, with_g: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(M, D, generator=generator, dtype=dtype), dim=-1).requires_grad_()
    v = torch.randn(K, D, generator=generator, dtype=dtype, requires_grad=True)
    g = torch.rand(K, 1, generator=generator, dtype=dtype).add_(0.5).requires_grad_()
    return (x, v, g) if with_g else (x, v)


def _teacher(
    *, dtype: torch.dtype = torch.float64, temp: float = 0.05
) -> tuple[PatchTargets, Tensor]:
    """Targets, and weights of the patches."""
    generator = torch.Generator().manual_seed(1)
    targets = PatchTargets(
        features=F.normalize(torch.randn(M, T, generator=generator, dtype=dtype), dim=-1),
        weight_v=torch.randn(K, T, generator=generator, dtype=dtype),
        weight_g=torch.rand(K, 1, generator=generator, dtype=dtype).add_(0.5),
        center=0.1 * torch.randn(K, generator=generator, dtype=dtype),
        temp=temp,
    )
    return targets, torch.rand(M, generator=generator, dtype=dtype)


def _logits(x: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
    return x @ (F.normalize(v, dim=-1) * (1 if g is None else g)).T


def _probs(targets: PatchTargets) -> Tensor:
    logits = _logits(targets.features, targets.weight_v, targets.weight_g)
    return ((logits - targets.center) / targets.temp).softmax(-1)


def _by_logits(
    x: Tensor, v: Tensor, g: Tensor | None = None, *, targets: PatchTargets, weights: Tensor
) -> Tensor:
    log_q = (_logits(x, v, g) / TAU).log_softmax(-1)
    return -(weights[:, None] * _probs(targets) * log_q).sum()


def _fused(
    x: Tensor, v: Tensor, g: Tensor | None = None, *, targets: PatchTargets, weights: Tensor
) -> Tensor:
    return patch_loss_of_prototypes(x, v, g, targets=targets, weights=weights, student_temp=TAU)[0]


@pytest.mark.parametrize("with_g", [False, True])
@pytest.mark.parametrize("chunk", [1, 3 * K, 2**22])  # one patch, three, all at once
def test_equals_plain_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, *, with_g: bool, chunk: int
) -> None:
    monkeypatch.setattr(ibot, "CHUNK", chunk)
    inputs, (targets, weights) = _student(with_g=with_g), _teacher()
    ours = _fused(*inputs, targets=targets, weights=weights)
    expected = _by_logits(*inputs, targets=targets, weights=weights)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    of_ours = torch.autograd.grad(3 * ours, inputs)  # as accumulation scales it
    for gradient, wanted in zip(of_ours, torch.autograd.grad(3 * expected, inputs), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("temp", [0.05, 1e-3, 1e-6])
def test_entropy_and_sum_of_the_targets(temp: float) -> None:
    targets, weights = _teacher(temp=temp)
    loss, entropy, target_sum = patch_loss_of_prototypes(
        *_student(), targets=targets, weights=weights, student_temp=TAU
    )
    probs = _probs(targets)
    torch.testing.assert_close(entropy, torch.special.entr(probs).sum(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(target_sum, probs.sum(0), rtol=1e-6, atol=1e-12)
    assert (loss.requires_grad, entropy.requires_grad, target_sum.requires_grad) == (1, 0, 0)


@pytest.mark.parametrize("with_g", [False, True])
def test_gradients_are_those_of_finite_differences(*, with_g: bool) -> None:
    targets, weights = _teacher()
    assert torch.autograd.gradcheck(
        partial(_fused, targets=targets, weights=weights), _student(with_g=with_g), atol=1e-6
    )


def test_low_temperatures_give_finite_gradients_in_float32() -> None:
    x, v, g = (leaf.detach() for leaf in _student(dtype=torch.float32))
    g, (targets, weights) = 50 * g, _teacher(dtype=torch.float32, temp=1e-3)
    leaves = [leaf.requires_grad_() for leaf in (x, v, g)]
    loss, entropy, _ = patch_loss_of_prototypes(
        *leaves, targets=targets, weights=weights, student_temp=1e-3
    )
    for tensor in (loss, entropy, *torch.autograd.grad(loss, leaves)):
        assert tensor.isfinite().all()


def test_bf16_prototypes_are_computed_in_float32() -> None:
    x, v = (leaf.detach() for leaf in _student(with_g=False, dtype=torch.float32))
    v, (targets, weights) = v.bfloat16().requires_grad_(), _teacher(dtype=torch.float32)
    targets = targets._replace(weight_v=targets.weight_v.bfloat16(), weight_g=None)
    with torch.autocast("cpu", torch.bfloat16):
        loss = _fused(x, v, targets=targets, weights=weights)
    (gradient,) = torch.autograd.grad(loss, v)
    exact = v.detach().float().requires_grad_()
    targets = targets._replace(weight_v=targets.weight_v.float())
    expected = _by_logits(x, exact, targets=targets, weights=weights)
    (wanted,) = torch.autograd.grad(expected, exact)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wanted.bfloat16(), rtol=1e-2, atol=1e-7)


def test_a_second_backward_gives_the_same_gradients() -> None:
    inputs, (targets, weights) = _student(), _teacher()
    loss = _fused(*inputs, targets=targets, weights=weights)
    first = torch.autograd.grad(2 * loss, inputs, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(2 * loss, inputs), strict=True):
        assert torch.equal(one, two)


def test_without_gradients_only_the_loss_is_computed() -> None:
    inputs, (targets, weights) = _student(), _teacher()
    with torch.no_grad():
        loss = _fused(*inputs, targets=targets, weights=weights)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, _fused(*inputs, targets=targets, weights=weights).detach())


def test_no_masked_patch_gives_zero_with_zero_gradients() -> None:
    x, v, g = _student()
    targets, weights = _teacher()
    targets = targets._replace(features=targets.features[:0])
    none = patch_loss_of_prototypes(
        x[:0], v, g, targets=targets, weights=weights[:0], student_temp=TAU
    )
    assert [float(part.detach().abs().sum()) for part in none] == [0, 0, 0]
    for gradient, leaf in zip(torch.autograd.grad(none[0], (x, v, g)), (x, v, g), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("wrong", ["features", "weight_v", "center", "weights"])
def test_targets_of_other_patches_or_prototypes_are_refused(wrong: str) -> None:
    targets, weights = _teacher()
    if wrong == "weights":
        weights = weights[1:]
    else:
        targets = targets._replace(**{wrong: getattr(targets, wrong)[1:]})
    with pytest.raises(ValueError, match="need equal numbers of patches"):
        _fused(*_student(), targets=targets, weights=weights)


def test_a_temperature_of_zero_is_refused() -> None:
    targets, weights = _teacher(temp=0.0)
    with pytest.raises(ValueError, match="need temperatures > 0"):
        _fused(*_student(), targets=targets, weights=weights)


def _peak(form: Callable[..., Tensor], num_patches: int) -> int:
    """Bytes of a loss with its gradients beyond what is there, 8192 prototypes."""
    torch.manual_seed(0)
    x, features = F.normalize(torch.randn(2, num_patches, 8), dim=-1)
    v, teacher_v = torch.randn(2, 8192, 8)
    leaves = [leaf.requires_grad_() for leaf in (x, v)]
    targets = PatchTargets(features, teacher_v, None, center=torch.zeros(8192), temp=0.05)

    def work() -> None:
        torch.autograd.backward(form(*leaves, targets=targets, weights=torch.ones(num_patches)))

    there = live_bytes()  # inputs, and what earlier tests of this process keep
    return with_peak_bytes(work)[1] - there


def test_memory_does_not_grow_with_the_patches() -> None:
    logits_of_512_more = 4 * 512 * 8192
    assert _peak(_fused, 1024) - _peak(_fused, 512) < 0.1 * logits_of_512_more


def test_memory_is_at_most_an_eighth_of_plain_cross_entropy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ibot, "CHUNK", 64 * 8192)  # an eighth of the 512 patches at a time
    assert _peak(_fused, 512) <= _peak(_by_logits, 512) / 8
