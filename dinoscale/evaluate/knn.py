"""Weighted nearest-neighbour classification of frozen features.

Shape letters: N images in the bank, M test images, D width, C classes, k neighbours.
Source: Wu et al. 2018 (arXiv:1805.01978), section 3.4, as used by Caron et al. 2021
(arXiv:2104.14294), section 4.1, and its published evaluation code.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

KS = (10, 20, 100, 200)  # of the published protocol; 20 is the number usually quoted
TEMP = 0.07  # of the votes, dimensionless; Wu et al. 2018
TOP = 5  # classes that may be right for the top-5 accuracy
SIMILARITIES_PER_CHUNK = 2**26  # 256 MiB of float32 at a time, whatever the size of the bank


@dataclass(frozen=True)
class KnnResult:
    """Accuracy for one number of neighbours, in percent of the test images."""

    k: int  # as asked for
    neighbours: int  # that voted: k, or the whole bank where it is smaller
    top1: float
    top5: float


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = KS,
    temp: float = TEMP,
    chunk_size: int | None = None,
) -> dict[int, KnnResult]:
    """Classify every test image by the votes of its k most similar images of the bank.

    votes[c] = sum over the k neighbours of class c of exp(cosine / temp)
    Classes with equal votes, also those without any, rank by their number. As in the published
    code, k < 5 counts only k classes for top-5.

    Args:
        train_features: the bank, (N, D), any float dtype and length; cosines run in float32.
        train_labels: (N,) int64, 0 or more.
        test_features: (M, D), on the same device.
        test_labels: (M,) int64; a class that the bank lacks is never right.
        ks: numbers of neighbours; one above N uses all N, with a warning.
        temp: > 0, dimensionless; infinity makes all votes equal.
        chunk_size: test images at a time, any number gives the same result; None fits the memory.

    Returns:
        One result per k.

    Raises:
        ValueError: shapes disagree, a set is empty, labels are negative, or a k, temp or chunk
            size is not positive.
    """
    _check(train_features, train_labels, test_features, test_labels)
    if not ks or min(ks) < 1 or not temp > 0 or (chunk_size is not None and chunk_size < 1):
        raise ValueError(f"need k, temp, chunk_size > 0; got {[*ks]}, {temp}, {chunk_size}")
    num_train, num_test = len(train_features), len(test_features)
    too_many = [k for k in ks if k > num_train]
    if too_many:
        log.warning("k = %s: the bank has only %d images, using all", too_many, num_train)
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    bank = F.normalize(train_features.float(), dim=1).T  # (D, N)
    right = {k: torch.zeros(2, dtype=torch.int64) for k in ks}  # top-1, top-5
    chunk_size = chunk_size or max(1, SIMILARITIES_PER_CHUNK // num_train)
    for start in range(0, num_test, chunk_size):
        features = test_features[start : start + chunk_size]
        similarity = F.normalize(features.float(), dim=1) @ bank  # (chunk, N)
        similarity, nearest = similarity.topk(min(max(ks), num_train), dim=1)
        votes, classes = (similarity / temp).exp(), train_labels[nearest]  # (chunk, max k)
        labels = test_labels[start : start + chunk_size]
        for k in right:
            right[k] += _count_right(votes[:, :k], classes[:, :k], labels, num_classes=num_classes)
    return {
        k: KnnResult(k, min(k, num_train), *(100 * count / num_test).tolist())
        for k, count in right.items()
    }


def _check(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> None:
    sets = {"train": (train_features, train_labels), "test": (test_features, test_labels)}
    for name, (features, labels) in sets.items():
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            shapes = f"{[*features.shape]}, {[*labels.shape]}"
            raise ValueError(f"{name}: need features (N, D) and labels (N,), N > 0; got {shapes}")
        if int(labels.min()) < 0:
            raise ValueError(f"{name}: an image without label cannot vote nor be judged")
    if train_features.shape[1] != test_features.shape[1]:
        widths = f"{train_features.shape[1]} and {test_features.shape[1]}"
        raise ValueError(f"features of train and test have different widths, {widths}")


def _count_right(votes: Tensor, classes: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:
    """Count images whose label gets most votes, and is among the five with most; (2,) int64."""
    total = votes.new_zeros(len(votes), num_classes).scatter_add_(1, classes, votes)  # (chunk, C)
    ranked = total.sort(dim=1, descending=True, stable=True).indices
    hits = ranked == labels[:, None]
    top = min(TOP, votes.shape[1])
    return torch.stack([hits[:, 0].sum(), hits[:, :top].sum()]).cpu()
