"""Accuracy of classifiers.

Shape letters: N images, G classifiers, C classes, L labels of an image at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TOP = 5  # classes that count for the top-5 accuracy


def num_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Count images whose class has the highest score, and one of the five highest.

    A non-finite score never counts as correct, nor does any score of an image with a NaN.

    Args:
        logits: scores of each class, (N, C), or (N, G, C) of G classifiers.
        labels: (N,) int64, or (N, L), of which any is right.

    Returns:
        Two int64 counts, each () or (G,).
    """
    hits = are_right(_ranked(logits), labels)
    return hits[..., 0].sum(dim=0), hits.any(dim=-1).sum(dim=0)


def are_right(classes: Tensor, labels: Tensor) -> Tensor:
    """Which classes (N, ...) are the label (N,) of their image, or among its labels (N, L)."""
    ones = [1] * (classes.ndim - 1)
    if labels.ndim == 1:
        return classes == labels.view(-1, *ones)
    return (classes[..., None] == labels.view(len(labels), *ones, -1)).any(-1)


def answers(logits: Tensor) -> Tensor:
    """The class with the highest score, (N,) of (N, C), as `num_correct` counts it; -1 for none."""
    return _ranked(logits)[..., 0]


def _ranked(logits: Tensor) -> Tensor:
    """The five classes with the highest scores, the highest first; -1 where none counts."""
    scores, best = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
    counted = scores.isfinite() & ~logits.isnan().any(dim=-1, keepdim=True)
    return torch.where(counted, best, -1)


def percent(top1: int, top5: int, *, images: int, num_classes: int) -> dict[str, float]:
    """Accuracies in percent; no top-5 for five classes or fewer, where it says nothing."""
    score = {"top1": 100 * top1 / images}
    return score | ({"top5": 100 * top5 / images} if num_classes > TOP else {})


def choose_best(entries: Sequence[Mapping[str, Any]], *, with_last: bool) -> dict[str, object]:
    """Report the entry with the highest top-1 accuracy on the test set, the first of equals.

    Args:
        entries: measurements with `top1` and maybe `top5`, in order.
        with_last: the score also has the accuracies of the last entry, which was not selected.

    Returns:
        `score`, and `chosen`: the entry, with the set that it was chosen on.
    """
    best, last = max(entries, key=lambda entry: entry["top1"]), entries[-1]
    names = [name for name in ("top1", "top5") if name in best]
    score = {name: best[name] for name in names}
    if with_last:
        score |= {f"last_{name}": last[name] for name in names}
    return {"score": score, "chosen": {**best, "chosen_on": "test"}}
