"""Every loss with plain prototypes equals that of their logits, a few of them at a time or all."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses import dino, ibot, sinkhorn
from dinoscale.losses.dino import dino_loss, dino_loss_of_prototypes
from dinoscale.losses.ibot import PatchTargets, patch_loss_of_prototypes
from dinoscale.losses.sinkhorn import sinkhorn_center

S, B, K, D = 4, 3, 11, 5
CHUNKS = [1, 2**22]  # logits at a time
TEMP = 0.07


def _tensors(*sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def _leaves() -> tuple[Tensor, Tensor]:
    """Unit vectors, and prototypes of many lengths."""
    x, weight = _tensors((S * B, D), (K, D))
    return F.normalize(x, dim=-1).requires_grad_(), (3 * weight).requires_grad_()


def _assert_same_gradients(found: Tensor, expected: Tensor, leaves: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, two in zip(
        torch.autograd.grad(2 * found, leaves),
        torch.autograd.grad(2 * expected, leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_class_loss(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(dino, "CHUNK", chunk)
    x, weight = _leaves()
    probs = _tensors((2, B, K))[0].softmax(-1)
    found, *_ = dino_loss_of_prototypes(
        x, weight, None, True, teacher_probs=probs, student_temp=0.1
    )
    expected = dino_loss((x @ weight.T).view(S, B, K), probs, student_temp=0.1)
    _assert_same_gradients(found, expected, (x, weight))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_patch_loss(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(ibot, "CHUNK", chunk)
    x, weight = _leaves()
    features, teacher, center, a = _tensors((S * B, D), (K, D), (K,), (S * B,))
    found, _, _ = patch_loss_of_prototypes(
        x,
        weight,
        None,
        True,
        targets=PatchTargets(features, teacher, None, center, TEMP, plain=True),
        weights=a.abs(),
        student_temp=0.1,
    )
    probs = ((features @ teacher.T - center) / TEMP).softmax(-1)
    log_q = (x @ weight.T / 0.1).log_softmax(-1)
    _assert_same_gradients(found, -(a.abs()[:, None] * probs * log_q).sum(), (x, weight))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_sinkhorn_knopp(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(sinkhorn, "CHUNK", chunk)
    x, weight = (leaf.detach() for leaf in _leaves())
    center = sinkhorn_center(
        [x], weight, None, True, temp=TEMP, sum_over_ranks=_same, max_over_ranks=_same
    )
    q = (x @ weight.T / TEMP).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    torch.testing.assert_close(((x @ weight.T - center) / TEMP).softmax(-1), q)


def _same(sums: Tensor) -> Tensor:
    return sums
