"""Average precision against scikit-learn and by hand, and random orders against many of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from dinoscale.evaluate.retrieval.ranking import (
    average_precision,
    random_precision,
    trapezoid_precision,
)


def test_the_step_rule_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    hits = rng.random((20, 50)) < 0.2
    expected = [average_precision_score(row, -np.arange(50)) for row in hits]
    found = average_precision(torch.from_numpy(hits), torch.from_numpy(hits.sum(axis=1)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_both_rules_by_hand() -> None:
    """Right at ranks 1 and 3 of 4. Steps: (1 + 2/3) / 2; trapezoids: (1 + (1/2 + 2/3) / 2) / 2."""
    hits, positives = torch.tensor([[True, False, True, False]]), torch.tensor([2])
    assert float(average_precision(hits, positives)) == pytest.approx((1 + 2 / 3) / 2)
    assert float(trapezoid_precision(hits, positives)) == pytest.approx(
        (1 + (1 / 2 + 2 / 3) / 2) / 2
    )


def test_a_first_hit_at_rank_two_counts_a_quarter_by_trapezoids() -> None:
    hits = torch.tensor([[False, True, False]])
    assert float(trapezoid_precision(hits, torch.tensor([1]))) == pytest.approx((0 + 1 / 2) / 2)


def test_unranked_positives_count_zero() -> None:
    hits = torch.tensor([[True, False]])
    for rule in (average_precision, trapezoid_precision):
        assert float(rule(hits, torch.tensor([4]))) == pytest.approx(1 / 4)


@pytest.mark.parametrize(("positives", "depth"), [(1, None), (4, None), (3, 5), (9, 20)])
def test_random_precision_is_the_mean_over_random_orders(positives: int, depth: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(40_000, 12, generator=generator).argsort(dim=1)
    hits = (order < positives)[:, :depth]
    total = torch.full((len(hits),), positives)
    for rule, trapezoids in ((average_precision, False), (trapezoid_precision, True)):
        expected = random_precision(
            images=12, positives=positives, depth=depth, trapezoids=trapezoids
        )
        assert float(rule(hits, total).mean()) == pytest.approx(expected, abs=0.006)
