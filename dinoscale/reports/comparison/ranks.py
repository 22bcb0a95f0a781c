"""Ranks of weights within a column of a comparison, and their mean over columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Ranks = Mapping[str, float]  # by the label of the weights


def ranks_of(scores: Mapping[str, float]) -> dict[str, float]:
    """Rank weights by a score, the highest first; equal ones share the mean of their places.

    Args:
        scores: by the label of the weights.

    Returns:
        1 for the best; of two equal best ones 1.5 each. Empty for fewer than two weights.
    """
    values = list(scores.values())
    if len(values) < 2:
        return {}
    return {
        label: 1 + sum(other > score for other in values) + (values.count(score) - 1) / 2
        for label, score in scores.items()
    }


def mean_ranks(columns: Sequence[Ranks], labels: Sequence[str]) -> tuple[dict[str, float], int]:
    """Mean rank over the columns that rank all of some weights, and how many columns that are.

    Args:
        columns: ranks of each.
        labels: of all weights.

    Returns:
        By label, in this order; empty without such a column.
    """
    whole = [ranks for ranks in columns if ranks and ranks.keys() >= {*labels}]
    if not whole:
        return {}, 0
    return {label: sum(r[label] for r in whole) / len(whole) for label in labels}, len(whole)
