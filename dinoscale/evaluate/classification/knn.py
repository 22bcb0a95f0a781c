"""Weighted nearest-neighbour classification of frozen features.

`knn_accuracy` is the arithmetic on tensors, `evaluate_knn` the whole measurement of a weights file
on two labelled sets.

Shape letters: N images in the bank, M test images, D width, C classes, k neighbours, L classes of
a test image at most.
Source: Wu et al. 2018 (arXiv:1805.01978), section 3.4, as used by Caron et al. 2021
(arXiv:2104.14294), section 4.1, and its published evaluation code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError
from dinoscale.evaluate.classification.accuracy import TOP, are_right
from dinoscale.evaluate.classification.answers import (
    NO_DETAILS,
    Answers,
    Details,
    classes_of_set,
    intervals,
)
from dinoscale.evaluate.classification.labelled_sets import (
    Features,
    LabelledSets,
    describe_set,
)
from dinoscale.evaluate.features import PIXEL_SIDE, pixel_features
from dinoscale.evaluate.frozen_backbone import (
    DEFAULT_EXTRACTION,
    ExtractionOptions,
    FeatureExtractor,
    load_extractor,
)
from dinoscale.runtime import distributed

Results = Mapping[int, "KnnResult"]  # by k

log = logging.getLogger(__name__)

KS = (10, 20, 100, 200)  # of the published protocol
QUOTED_K = 20  # the one usually quoted
TEMP = 0.07  # of the votes, dimensionless; Wu et al. 2018
# Cosines held at a time: 256 MiB of float32.
TEST_CHUNK, BANK_CHUNK = 2**10, 2**16


@dataclass(frozen=True)
class KnnResult:
    """Accuracy for one number of neighbours, in percent of the test images."""

    k: int  # as requested
    neighbours: int  # that voted: k, or the whole bank if it is smaller
    top1: float
    top5: float
    classes: Tensor = field(compare=False, repr=False)  # with the most votes, (M,) int64


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = KS,
    temp: float = TEMP,
    chunk_size: int | None = None,
    bank_chunk_size: int = BANK_CHUNK,
    on_chunk: Callable[[], None] = lambda: None,
) -> dict[int, KnnResult]:
    """Classify every test image by the votes of its k most similar images of the bank.

    votes[c] = sum over the k neighbours of class c of exp(cosine / temp)
    Of equally similar images the first in the bank counts as nearer. Classes with equal votes, or
    none, rank by their number. As in the published code, top-5 counts only k classes if k < 5.

    At most `chunk_size` x `bank_chunk_size` cosines are in memory at a time. All ranks call it with
    the same tensors, and each classifies its share of the chunks.

    Args:
        train_features: the bank, (N, D), any float dtype and norm; cosines run in float32.
        train_labels: (N,) int64, 0 or more.
        test_features: (M, D), on the same device.
        test_labels: (M,) int64; a class that the bank lacks is never correct. Or (M, L), of which
            each is correct.
        ks: numbers of neighbours; a k above N uses all N, with a warning.
        temp: > 0, dimensionless; infinity makes all votes equal.
        chunk_size: test images at a time; does not change the result. None: 1024.
        bank_chunk_size: images of the bank at a time; does not change the result.
        on_chunk: called after each chunk; an error that it raises on one rank ends all ranks.

    Returns:
        One result per k, on every rank.

    Raises:
        DinoscaleError: on every rank; `on_chunk` raised on one, or it is out of memory.
        ValueError: shapes disagree, a set is empty, labels are negative, or a k, temp or chunk
            size is not positive.
    """
    chunk_size = TEST_CHUNK if chunk_size is None else chunk_size
    sets = (train_features, train_labels, test_features, test_labels)
    _check_sets(*sets)
    _check_numbers(ks, temp, chunk_size, bank_chunk_size)
    num_train = len(train_features)
    if too_many := [k for k in ks if k > num_train]:
        log.warning("k = %s: the bank has only %d images, using all", too_many, num_train)
    chunks = chunk_size, bank_chunk_size
    answer = partial(_answers_of_rank, *sets, ks=ks, temp=temp, chunks=chunks, on_chunk=on_chunk)
    answers = distributed.all_reduce_sum(distributed.together(answer))  # others' images are 0
    percent = (100 * answers[..., 1:].sum(1).double() / len(test_labels)).tolist()
    return {
        k: KnnResult(k, min(k, num_train), top1, top5, answer[:, 0])
        for k, (top1, top5), answer in zip(ks, percent, answers, strict=True)
    }


def _answers_of_rank(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int],
    temp: float,
    chunks: tuple[int, int],
    on_chunk: Callable[[], None],
) -> Tensor:
    """Class, and whether it and one of the top five are right, of the images of this rank's chunks.

    Returns:
        (number of ks, M, 3) int64, zero for the images of other ranks.
    """
    chunk_size, bank_chunk_size = chunks
    most = min(max(ks), len(train_features))
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    answers = test_labels.new_zeros(len(ks), len(test_labels), 3)
    starts = range(0, len(test_labels), chunk_size)
    for start in starts[distributed.rank() :: distributed.world_size()]:
        chunk = slice(start, start + chunk_size)
        similarity, nearest = nearest_neighbours(
            train_features, test_features[chunk], k=most, bank_chunk_size=bank_chunk_size
        )
        classes = train_labels[nearest]  # (chunk, largest k)
        for i, k in enumerate(ks):
            of_k = similarity[:, :k], classes[:, :k]
            votes = log_votes(*of_k, temp=temp, num_classes=num_classes)
            answers[i, chunk] = _answers(votes, test_labels[chunk], k=k)
        on_chunk()
    return answers


def _check_sets(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> None:
    sets = {"train": (train_features, train_labels), "test": (test_features, test_labels)}
    for name, (features, labels) in sets.items():
        of_one = labels.amax(1) if name == "test" and labels.ndim == 2 else labels
        if features.ndim != 2 or of_one.shape != features.shape[:1] or not len(labels):
            shapes = f"{[*features.shape]}, {[*labels.shape]}"
            raise ValueError(f"{name}: need features (N, D) and labels (N,), N > 0; got {shapes}")
        if int(of_one.min()) < 0:
            raise ValueError(f"{name}: every image needs a label to vote or to be scored")
    if train_features.shape[1] != test_features.shape[1]:
        widths = f"{train_features.shape[1]} and {test_features.shape[1]}"
        raise ValueError(f"features of train and test have different widths, {widths}")


def _check_numbers(ks: Sequence[int], temp: float, chunk_size: int, bank_chunk_size: int) -> None:
    if not ks or min(ks) < 1 or not temp > 0 or min(chunk_size, bank_chunk_size) < 1:
        chunks = f"{chunk_size}, {bank_chunk_size}"
        raise ValueError(f"need k, temp, chunk_size > 0; got {[*ks]}, {temp}, {chunks}")


def nearest_neighbours(
    bank: Tensor, features: Tensor, *, k: int, bank_chunk_size: int = BANK_CHUNK
) -> tuple[Tensor, Tensor]:
    """Find the most similar images of a bank, chunk by chunk.

    Args:
        bank: (N, D), any length.
        features: (M, D); M x `bank_chunk_size` cosines are in memory at a time.
        k: neighbours, at most N.
        bank_chunk_size: images of the bank at a time.

    Returns:
        Cosines (M, k) float32, the largest first, and numbers of the images in the bank (M, k); of
        equal cosines the one with the lower number first.
    """
    queries = F.normalize(features.float(), dim=1)
    best = queries.new_empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), bank_chunk_size):
        chunk = F.normalize(bank[start : start + bank_chunk_size].float(), dim=1)
        values, columns = _largest(queries @ chunk.T, k=min(k, len(chunk)))
        # What came before has lower numbers, and a stable sort leaves it in front.
        best, order = torch.cat([best, values], 1).sort(dim=1, descending=True, stable=True)
        numbers = torch.cat([numbers, columns + start], 1).gather(1, order[:, :k])
        best = best[:, :k]
    return best, numbers


def _largest(similarity: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns; of equals the first, unlike `topk`."""
    values, columns = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    tied = (values[:, k - 1 : k] == values[:, k:]).any(1)  # the first left out is as large
    values, columns = values[:, :k], columns[:, :k]
    for row in tied.nonzero().flatten().tolist():
        least = values[row, -1]
        larger = int((values[row] > least).sum())
        equal = (similarity[row] == least).nonzero().flatten()
        columns[row, larger:] = equal[: k - larger]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def log_votes(similarity: Tensor, classes: Tensor, *, temp: float, num_classes: int) -> Tensor:
    """Logarithm of the votes of every class, which no temperature overflows.

    log votes[c] = m / temp + log sum exp((cosine - m) / temp), m the largest cosine of class c

    Args:
        similarity: cosines of the neighbours, (M, k).
        classes: of the neighbours, (M, k) int64.
        temp: > 0, dimensionless.
        num_classes: C.

    Returns:
        (M, C) float64, minus infinity for classes without a neighbour.
    """
    cosines = similarity.double()
    shape = len(cosines), num_classes
    most = cosines.new_full(shape, -2.0).scatter_reduce_(1, classes, cosines, "amax")
    shares = ((cosines - most.gather(1, classes)) / temp).exp()
    return most / temp + cosines.new_zeros(shape).scatter_add_(1, classes, shares).log()


def _answers(votes: Tensor, labels: Tensor, *, k: int) -> Tensor:
    """Class with the most votes, whether it is the label, and whether one of five is: (M, 3)."""
    ranked = votes.sort(dim=1, descending=True, stable=True).indices[:, : min(TOP, k)]
    hits = are_right(ranked, labels)
    return torch.stack([ranked[:, 0], hits[:, 0], hits.any(1)], dim=1)


def evaluate_knn(
    weights_path: str | Path,
    train_spec: str,
    test_spec: str,
    *,
    ks: Sequence[int] = KS,
    temp: float = TEMP,
    pixels: bool = False,
    untrained: bool = False,
    labels_path: str | Path | None = None,
    details: Details = NO_DETAILS,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Measure a weights file by k-NN, and optionally baselines on the same two sets.

    All ranks of a job call it; each does its share, and all get the report.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        train_spec: the bank, as `data.train` of a config: a folder with a subfolder a class, or
            shards with class numbers.
        test_spec: what to classify; its classes must be among those of the bank.
        ks: numbers of neighbours.
        temp: of the votes, dimensionless.
        pixels: also measure 16 x 16 pixels, minus the bank's mean image.
        untrained: also measure the same architecture with fresh weights.
        labels_path: of several right classes for each test image, see `label_lists`; no top-5 then.
        details: what to say of the answers for single images, by the first k of `score`.
        options: which network, which device, and how features are extracted.

    Returns:
        The report, ready for JSON: `knn` maps each k, as text, to `top1`, `top5` (percent) and
        `neighbours`; `score` has the top-1, that of k = 20 first; the rest says what and how.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range.
        DataError: a set cannot be read, has no labels, or the test set has other classes.
    """
    _check_settings(ks=ks, temp=temp)
    details.check()
    extractor = load_extractor(weights_path, options)
    sets = LabelledSets.open(train_spec, test_spec, extractor.open, labels_path=labels_path)
    features = sets.features(extractor.unlabelled)
    by_k = _classify(features, ks=ks, temp=temp)
    report = extractor.report(
        "knn",
        train=_describe(train_spec, sets.bank, features.bank_labels),
        test=sets.describe_test(test_spec, features),
        protocol=_protocol(extractor, ks=ks, temp=temp),
        score=_score(by_k),
        knn=_by_k(by_k, sets),
        intervals=intervals(_score(by_k), images=len(features.test)),
        **_answers_of(sets, features, by_k).report(details),
    )
    if untrained:
        fresh = sets.features(extractor.untrained().unlabelled)
        report["untrained"] = _score(_classify(fresh, ks=ks, temp=temp))
    if pixels:
        report |= _pixel_baseline(sets, ks=ks, temp=temp, num_workers=options.num_workers)
    return report


def _check_settings(*, ks: Sequence[int], temp: float) -> None:
    if not ks or min(ks) < 1:
        raise ConfigError(f"ks: need at least one number of neighbours, all above 0; got {[*ks]}")
    if not temp > 0:
        raise ConfigError(f"temp: need a number above 0, got {temp}")


def _classify(features: Features, *, ks: Sequence[int], temp: float) -> Results:
    bank, bank_labels, test, test_labels, *_ = features
    return knn_accuracy(bank, bank_labels, test, test_labels, ks=ks, temp=temp)


def _by_k(results: Results, sets: LabelledSets) -> dict[str, dict[str, float]]:
    """All numbers of each k; of several labels there is no top-5, as in their paper."""
    names = ("top1", "top5", "neighbours") if sets.lists is None else ("top1", "neighbours")
    return {str(k): {name: getattr(found, name) for name in names} for k, found in results.items()}


def _answers_of(sets: LabelledSets, features: Features, results: Results) -> Answers:
    """The answers of the number of neighbours that is quoted."""
    return Answers(
        sets.test,
        classes_of_set(sets.bank),
        features.test_numbers.cpu(),
        features.test_labels.cpu(),
        results[_quoted_first(results)[0]].classes.cpu(),
    )


def _describe(spec: str, source: Source, labels: Tensor) -> dict[str, object]:
    return describe_set(spec, source, labels, unreadable=len(source) - len(labels))


def _protocol(extractor: FeatureExtractor, *, ks: Sequence[int], temp: float) -> dict[str, object]:
    return {
        "method": "weighted k-NN, cosine similarity, votes exp(similarity / temp)",
        "features": "backbone output (of a ViT: normalised CLS token), L2-normalised",
        "network": extractor.options.network,
        "ks": [*ks],
        "temp": temp,
        **extractor.preparation,
        "max_pixel_value": extractor.card.max_pixel_value,
    }


def _quoted_first(results: Results) -> list[int]:
    return sorted(results, key=lambda k: k != QUOTED_K)


def _score(results: Results) -> dict[str, float]:
    """Top-1 of each k, the usually quoted k first."""
    return {f"top1_k{k}": results[k].top1 for k in _quoted_first(results)}


def _pixel_baseline(
    sets: LabelledSets, *, ks: Sequence[int], temp: float, num_workers: int
) -> dict[str, object]:
    """k-NN on pixels, with the protocol's votes, and with equal votes as in classical k-NN."""
    features = sets.features(partial(pixel_features, num_workers=num_workers))
    mean = features.bank.mean(dim=0)
    features = features._replace(bank=features.bank - mean, test=features.test - mean)
    by_k = _classify(features, ks=ks, temp=temp)
    about = f"{PIXEL_SIDE} x {PIXEL_SIDE} pixels by area averaging, less the bank's mean"
    equal = _classify(features, ks=ks, temp=math.inf)
    return {
        "floors": _score(by_k),
        "pixels": {
            "features": about,
            "knn": _by_k(by_k, sets),
            "knn_equal_votes": _by_k(equal, sets),
        },
    }
