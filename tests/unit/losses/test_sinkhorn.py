"""Sinkhorn-Knopp by offsets equals the iterations on the whole matrix, at any temperature."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses import sinkhorn
from dinoscale.losses.centering import teacher_probs
from dinoscale.losses.sinkhorn import Reduction, sinkhorn_center
from tests.thread_ranks import on_ranks

M, K, D = 24, 11, 6
alone = partial(sinkhorn_center, sum_over_ranks=torch.clone, max_over_ranks=torch.clone)


def _samples(*, length: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Unit vectors x, prototypes v and lengths g near `length`."""
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(M, D, generator=generator, dtype=torch.float64), dim=-1)
    v = torch.randn(K, D, generator=generator, dtype=torch.float64)
    g = length * torch.rand(K, 1, generator=generator, dtype=torch.float64).add_(0.5)
    return x.to(dtype), v.to(dtype), g.to(dtype)


def _logits(x: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return x @ (F.normalize(v, dim=-1) * g).T


def _on_the_whole_matrix(logits: Tensor, *, temp: float, iterations: int = 3) -> Tensor:
    """As published, in logarithms."""
    log_q = (logits / temp).T
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(1, keepdim=True)  # prototypes
        log_q = log_q - log_q.logsumexp(0, keepdim=True)  # samples
    return log_q.exp().T


def test_recorded_example() -> None:
    logits = torch.tensor([[0.2, -0.1, 0.4], [0, 0.3, -0.2], [0.1, 0.1, 0.5], [-0.3, 0.6, 0]])
    # Rows of the identity are unit vectors, with which v = logits^T, g = ||v|| give the logits.
    center = alone([torch.eye(4)], logits.T, logits.T.norm(dim=1, keepdim=True), temp=0.1)
    expected = [
        [0.5798827, 0.0009250, 0.4191923],
        [0.6035820, 0.3884265, 0.0079916],
        [0.1568991, 0.0050270, 0.8380740],
        [0.0038083, 0.9887084, 0.0074834],
    ]
    found = teacher_probs(logits, center, temp=0.1)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5 * K, 2**22])  # one sample, five, all of a micro-batch
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(("temp", "length"), [(0.04, 1), (1e-3, 1), (1e-3, 50), (1e-6, 50)])
def test_equals_the_iterations_on_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch, *, chunk: int, iterations: int, temp: float, length: float
) -> None:
    monkeypatch.setattr(sinkhorn, "CHUNK", chunk)
    x, v, g = _samples(length=length)
    center = alone(x.split([9, 0, 15]), v, g, temp=temp, iterations=iterations)
    logits = _logits(x, v, g)
    expected = _on_the_whole_matrix(logits, temp=temp, iterations=iterations)
    # A probability of 1e-12 at a logit of 50 / 1e-6 has 7 digits left in float64.
    found = teacher_probs(logits, center, temp=temp)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("temp", [0.04, 1e-3, 1e-6])
def test_float32_keeps_its_digits_at_any_temperature(temp: float) -> None:
    x, v, g = _samples(length=50, dtype=torch.float32)
    center = alone([x], v, g, temp=temp)
    exact = alone([x.double()], v.double(), g.double(), temp=temp)
    logits = _logits(x.double(), v.double(), g.double())
    # Each of the 3 iterations moves c by at most the error of a logit: D products and some sums.
    bound = 3 * (D + 4) * torch.finfo(torch.float32).eps * logits.abs().max()
    assert center.dtype == torch.float32
    assert (center - exact).abs().max() < bound


def test_bf16_prototypes_are_computed_in_float32() -> None:
    x, v, g = _samples(dtype=torch.float32)
    v, g = v.bfloat16(), g.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        center = alone([x], v, g, temp=0.04)
    assert torch.equal(center, alone([x], v.float(), g.float(), temp=0.04))


def test_prototypes_get_equal_shares_in_the_end() -> None:
    x, v, g = _samples()
    center = alone([x], v, g, temp=0.1, iterations=200)
    shares = teacher_probs(_logits(x, v, g), center, temp=0.1).sum(0)
    torch.testing.assert_close(shares, torch.full_like(shares, M / K), rtol=1e-6, atol=0)


@pytest.mark.parametrize("temp", [0.04, 1e-3])
@pytest.mark.parametrize("rows", [[9, 15], [17, 0, 7], [0, 24]])
def test_ranks_together_give_the_offset_of_one(temp: float, rows: list[int]) -> None:
    x, v, g = _samples(length=50)

    def center(share: Tensor, total: Reduction, highest: Reduction) -> Tensor:
        return sinkhorn_center(
            share.split(4), v, g, temp=temp, sum_over_ranks=total, max_over_ranks=highest
        )

    expected = alone([x], v, g, temp=temp)
    for found in on_ranks(center, x.split(rows)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_ranks_exchange_a_maximum_and_one_sum_per_iteration() -> None:
    x, v, g = _samples()
    shapes: dict[str, list[tuple[int, ...]]] = {"sums": [], "maxima": []}

    def recorded(kind: str, tensor: Tensor) -> Tensor:
        shapes[kind].append((*tensor.shape,))
        return tensor

    sinkhorn_center(
        [x],
        v,
        g,
        temp=0.04,
        iterations=3,
        sum_over_ranks=partial(recorded, "sums"),
        max_over_ranks=partial(recorded, "maxima"),
    )
    assert shapes == {"sums": 3 * [(K,)], "maxima": [(K,)]}


def test_no_sample_on_any_rank_gives_finite_offsets() -> None:
    x, v, _ = _samples(dtype=torch.float32)
    for features in ([], [x[:0]]):
        assert alone(features, v, None, temp=1e-3).isfinite().all()


@pytest.mark.parametrize(("temp", "iterations"), [(0.0, 3), (0.04, 0)])
def test_settings_without_a_meaning_are_refused(temp: float, iterations: int) -> None:
    x, v, g = _samples()
    with pytest.raises(ValueError, match="need temp > 0 and iterations >= 1"):
        alone([x], v, g, temp=temp, iterations=iterations)
