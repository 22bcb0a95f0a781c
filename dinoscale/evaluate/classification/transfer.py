"""Few-shot and full accuracy over many labelled sets, on features extracted once.

Shape letters: N images to learn from, D width.
Source: the sets and the regression follow the transfer tables of Chen et al. 2020
(arXiv:2002.05709) and Oquab et al. 2023 (arXiv:2304.07193); few-shot subsets are nested, as in
Assran et al. 2022 (arXiv:2204.07141), who average over several of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.classification.accuracy import num_correct
from dinoscale.evaluate.classification.knn import QUOTED_K, TEMP, knn_accuracy
from dinoscale.evaluate.classification.labelled_sets import Features, LabelledSets, labels_of
from dinoscale.evaluate.classification.logistic import (
    CS,
    HELD_OUT,
    MAX_ITER,
    fit_and_score,
    held_out,
)
from dinoscale.evaluate.features import check_labels
from dinoscale.evaluate.finished_items import FinishedItems, Form
from dinoscale.evaluate.frozen_backbone import (
    DEFAULT_EXTRACTION,
    ExtractionOptions,
    FeatureExtractor,
    load_extractor,
)
from dinoscale.evaluate.overlap import first_of_equals
from dinoscale.evaluate.progress import bar_options
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import Fingerprint
from dinoscale.runtime.opening import on_first_rank, open_once_per_node

log = logging.getLogger(__name__)

SHOTS = (1, 5, 10)  # images of a class to learn from
SEEDS = 5  # subsets of each number
C_CHOICES = CS[::4]  # 12 of the 45 inverse penalties of `logistic`
ALONE_C = 1.0  # where every class has one image, so that none is left to choose C on
FITS_AT_ONCE = 8  # of each rank between two writes of results, for another start
TESTED = 0.2  # of each class of a set that is not split
ALL = "all"  # the name of the whole train set

_TEST_FOLDERS = ("test", "val")  # beside train

Rows = NDArray[np.float64]  # (N, D)
Numbers = NDArray[np.int64]  # (N,)
Chosen = NDArray[np.bool_]  # (N,)


@dataclass(frozen=True)
class Plan:
    """What is measured on every set.

    Attributes:
        shots: images of a class to learn from, besides all.
        seeds: number of subsets for each.
        k: neighbours that vote.
        cs: inverse penalties of the logistic regression to choose from.
        max_iter: of L-BFGS.
    """

    shots: tuple[int, ...] = SHOTS
    seeds: int = SEEDS
    k: int = QUOTED_K
    cs: tuple[float, ...] = C_CHOICES
    max_iter: int = MAX_ITER

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ConfigError: one is, or a number of shots comes twice.
        """
        numbers = (*self.shots, self.seeds, self.k, self.max_iter)
        if min(numbers) < 1 or not self.cs or min(self.cs) <= 0:
            raise ConfigError(f"need shots, seeds, k, max_iter and C above 0; got {self}")
        if len({*self.shots}) < len(self.shots):
            raise ConfigError(f"shots: each number once, got {[*self.shots]}")

    def subsets(self) -> list[tuple[str, int | None, int]]:
        """Name, images of a class, and seed of every subset; None stands for all images."""
        few = [(str(n), n, seed) for n in sorted(self.shots) for seed in range(self.seeds)]
        return [*few, (ALL, None, 0)]


class _Set(NamedTuple):
    """Features of one set, and how they were split."""

    features: Features
    same: Numbers  # (N,), the same number for equal pictures of the bank
    about: dict[str, object]  # ready for JSON


def evaluate_transfer(
    weights_path: str | Path,
    specs: Sequence[str],
    *,
    plan: Plan | None = None,
    untrained: bool = False,
    fingerprint: Fingerprint | None = None,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Measure k-NN and logistic regression on every set, from few images and from all.

    All ranks of a job call it; they share the images and the regressions.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        specs: the sets: folders with `train` and `test` (or `val`), or labelled images as
            `data.train` of a config, of which a fifth of each class is tested on.
        plan: what is measured; None takes the defaults.
        untrained: also measure the same architecture with fresh weights.
        fingerprint: of the measurement, as of `FinishedItems`, to go on after an interruption.
        options: which network, which device, and how images are read.

    Returns:
        Ready for JSON, in percent: `score` has the means over the sets, `sets` for every set the
        `mean`, `spread` (standard deviation) and `top1` of the subsets, and the `images` of one, by
        classifier and shots.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or a set is named twice.
        DataError: a set cannot be read, lacks labels, or has nothing to test on.
        NonFiniteError: a feature is not a finite number.
    """
    plan = plan or Plan()
    plan.check()
    twice = next((spec for spec in specs if specs.count(spec) > 1), None)
    if twice is not None or not specs:
        raise ConfigError(f"sets: need at least one, each once; got {[*specs]}")
    extractor = load_extractor(weights_path, options)
    sets = {spec: _features(extractor, spec) for spec in specs}
    fits = [FinishedItems(fingerprint, extractor.device, of=of) for of in ("trained", "untrained")]
    found = _measure(sets, plan, fits[0], progress=options.progress)
    report = extractor.report(
        "transfer",
        data={spec: each.about for spec, each in sets.items()},
        protocol=_protocol(extractor, plan),
        score=_means(found),
        sets=_as_json(found),
    )
    if untrained:
        fresh = extractor.untrained()
        sets = {spec: _features(fresh, spec) for spec in specs}
        report["untrained"] = _means(_measure(sets, plan, fits[1], progress=options.progress))
    return report


def _protocol(extractor: FeatureExtractor, plan: Plan) -> dict[str, object]:
    card = extractor.card
    return {
        "method": "weighted k-NN, and scikit-learn's logistic regression with an L2 penalty",
        "features": "backbone output (of a ViT: normalised CLS token), L2-normalised",
        "network": extractor.options.network,
        **asdict(plan),
        "temp": TEMP,
        "chosen": f"C on a held-out part of the images to learn from, of one a class {ALONE_C:g}",
        "subsets": "nested: of a seed and a class, the first ones of one permutation",
        "unsplit": f"of a set without train and test, {TESTED:.0%} of each class are tested on;"
        " pictures with the same bytes stay on one side, also where C is chosen",
        "mean_over": "subsets, then sets",
        "resize": card.resize,
        "crop": card.crop,
        "interpolation": "bicubic",
        "mean": list(card.mean),
        "std": list(card.std),
    }


def _features(extractor: FeatureExtractor, spec: str) -> _Set:
    """Extract the features of both parts of a set; all ranks call it."""
    parts = split_of(spec)
    if parts is not None:
        sets = LabelledSets.open(*parts, extractor.open)
        features = sets.features(extractor.unlabelled)
        same, split = np.arange(len(features.bank)), os.path.basename(parts[1])
        copies = None
    else:
        features, same, copies = _unsplit(extractor, spec)
        split = f"{TESTED:.0%} of each class"
    counts = features.bank_labels.bincount()
    about: dict[str, object] = {
        "train_images": len(features.bank),
        "test_images": len(features.test),
        "classes": int((counts > 0).sum()),
        "fewest_of_a_class": int(counts[counts > 0].min()),
        "test": split,
        "equal_pictures": copies,
    }
    return _Set(features, same, about)


def split_of(spec: str) -> tuple[str, str] | None:
    """The folders to learn from and to test on in a folder; None if it is not split.

    Raises:
        DataError: the folder has `train` and nothing to test on beside it, or both.
    """
    folder = os.path.expanduser(spec)
    train = os.path.join(folder, "train")
    if not os.path.isdir(train):
        return None
    found = [name for name in _TEST_FOLDERS if os.path.isdir(os.path.join(folder, name))]
    if len(found) != 1:
        has = "both test and val" if found else "neither test nor val"
        raise DataError(
            f"{spec}: has train, and {has} beside it. Leave the one that is tested on, or name"
            " folders of classes."
        )
    return train, os.path.join(folder, found[0])


def _unsplit(extractor: FeatureExtractor, spec: str) -> tuple[Features, Numbers, int]:
    """Features of both parts of a set without parts, which of the bank are equal, and how many."""
    source = open_once_per_node(partial(extractor.open, spec))
    check_labels(source, name=spec)
    first = distributed.broadcast_object(on_first_rank(lambda _: first_of_equals(source)))
    assert first is not None
    features, numbers = extractor.unlabelled(source)
    same = first[numbers.cpu().numpy()]
    copies = len(same) - len(np.unique(same))
    if copies:
        log.warning("%s: %d pictures equal an earlier one; they stay on one side", spec, copies)
    labels = labels_of(source, numbers, name=spec)
    tested = _tested(labels.cpu().numpy(), same, spec=spec)
    at = torch.from_numpy(tested).to(labels.device)
    parts = Features(features[~at], labels[~at], features[at], labels[at], numbers[at])
    return parts, same[~tested], copies


def _tested(labels: Numbers, same: Numbers, *, spec: str) -> Chosen:
    """Hold a fifth of each class out to test on, at least one picture of a class of two or more."""
    counts = _different(labels, same)
    if (counts > 0).sum() < 2 or counts.max() < 2:
        raise DataError(
            f"{spec}: need readable images of two classes at least, and two different ones of one"
            " of them, to test on one."
        )
    return _held_out(labels, same, seed=0, share=TESTED)


def _different(labels: Numbers, same: Numbers) -> Numbers:
    """Number of different pictures of each class."""
    _, first = np.unique(same, return_index=True)
    return np.bincount(labels[first])


def _held_out(labels: Numbers, same: Numbers, *, seed: int, share: float = HELD_OUT) -> Chosen:
    """As `held_out`, of different pictures; equal ones (`same`, (N,)) go with the first of them."""
    _, first, group = np.unique(same, return_index=True, return_inverse=True)
    return held_out(labels[first], seed=seed, share=share)[group]


def few_of_each(labels: Numbers, *, shots: int, seed: int) -> Chosen:
    """Choose images of each class, (N,) bool: those of fewer shots are among those of more.

    Args:
        labels: (N,).
        shots: of each class; all images of a class with fewer.
        seed: of the choice; that of a class does not depend on the others.
    """
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for number in np.unique(labels):
        members = np.flatnonzero(labels == number)
        order = np.random.default_rng((seed, int(number))).permutation(members)
        chosen[order[:shots]] = True
    return chosen


@dataclass(frozen=True)
class _Summary:
    """Of the subsets of one size, in percent; a single one, or equal ones, have no spread."""

    mean: float
    spread: float | None  # standard deviation
    top1: list[float]
    images: int  # of a subset; fewer than shots of each class where a class has fewer


Found = dict[str, dict[str, _Summary]]  # classifier -> shots


def _measure(
    sets: Mapping[str, _Set], plan: Plan, fits: FinishedItems, *, progress: bool
) -> dict[str, Found]:
    """Every classifier on every subset of every set; all ranks call it."""
    jobs = [(spec, *subset) for spec in sets for subset in plan.subsets()]
    shown = progress and distributed.rank() == 0
    total = len(jobs[distributed.rank() :: distributed.world_size()])
    with tqdm(total=total, unit="fit", **bar_options(shown=shown)) as bar:

        def fit(job: tuple[str, str, int | None, int]) -> float:
            spec, _, shots, seed = job
            top1 = _logistic(sets[spec], shots, plan=plan, seed=seed)
            bar.update()
            return top1

        regressions = fits.each(jobs, fit, Form[float](float, float), at_once=FITS_AT_ONCE)
    neighbours = [_knn(sets[spec].features, n, k=plan.k, seed=seed) for spec, _, n, seed in jobs]
    found: dict[str, Found] = {}
    for spec in sets:
        found[spec] = {}
        for classifier, results in (("logistic", regressions), ("knn", neighbours)):
            by_shots: dict[str, list[float]] = {}
            for (of, name, *_), top1 in zip(jobs, results, strict=True):
                if of == spec:
                    by_shots.setdefault(name, []).append(top1)
            bank = sets[spec].features.bank_labels
            found[spec][classifier] = {
                name: _summary(of, name, bank) for name, of in by_shots.items()
            }
    return found


def _summary(top1: list[float], shots: str, labels: Tensor) -> _Summary:
    """Of the subsets of some shots of a bank with these labels (N,)."""
    number = None if shots == ALL else int(shots)
    images = int(labels.bincount().clamp(max=number).sum()) if number else len(labels)
    differ = len(top1) > 1 and images < len(labels)
    spread = float(np.std(top1, ddof=1)) if differ else None
    return _Summary(float(np.mean(top1)), spread, top1, images)


def _means(found: Mapping[str, Found]) -> dict[str, float]:
    """Means over the sets, those of all images first."""
    first = next(iter(found.values()))
    names = [(c, shots) for c in first for shots in sorted(first[c], key=lambda x: x != ALL)]
    return {
        f"{classifier}_{shots}": float(
            np.mean([of[classifier][shots].mean for of in found.values()])
        )
        for classifier, shots in names
    }


def _as_json(found: Mapping[str, Found]) -> dict[str, object]:
    return {
        spec: {
            classifier: {shots: asdict(of) for shots, of in by_shots.items()}
            for classifier, by_shots in of_set.items()
        }
        for spec, of_set in found.items()
    }


def _chosen(labels: Tensor, shots: int | None, seed: int) -> Tensor:
    """(N,) bool on the device of the labels."""
    if shots is None:
        return torch.ones_like(labels, dtype=torch.bool)
    chosen = few_of_each(labels.cpu().numpy(), shots=shots, seed=seed)
    return torch.from_numpy(chosen).to(labels.device)


def _knn(features: Features, shots: int | None, *, k: int, seed: int) -> float:
    """Top-1 of k-NN in percent; all ranks call it."""
    at = _chosen(features.bank_labels, shots, seed)
    bank, labels = features.bank[at], features.bank_labels[at]
    k = min(k, len(bank))
    return knn_accuracy(bank, labels, features.test, features.test_labels, ks=(k,))[k].top1


def _logistic(of: _Set, shots: int | None, *, plan: Plan, seed: int) -> float:
    """Top-1 of a logistic regression in percent."""
    features = of.features
    at = _chosen(features.bank_labels, shots, seed)
    train, labels = _rows(features.bank[at]), features.bank_labels[at].cpu().numpy()
    c = _choose_c(train, labels, of.same[at.cpu().numpy()], plan=plan, seed=seed)
    scores, _ = fit_and_score(train, labels, _rows(features.test), c=c, max_iter=plan.max_iter)
    return _top1(scores, features.test_labels.cpu().numpy())


def _choose_c(train: Rows, labels: Numbers, same: Numbers, *, plan: Plan, seed: int) -> float:
    """The C of the highest accuracy on a held-out part, the smallest of equals."""
    counts = _different(labels, same)
    if counts.max() == 1 or (counts > 0).sum() < 2:
        return ALONE_C
    held = _held_out(labels, same, seed=seed)

    def accuracy(c: float) -> float:
        kept = train[~held], labels[~held]
        scores, _ = fit_and_score(*kept, train[held], c=c, max_iter=plan.max_iter)
        return _top1(scores, labels[held])

    return max(sorted(plan.cs), key=accuracy)


def _rows(features: Tensor) -> Rows:
    rows: Rows = F.normalize(features.double(), dim=1).cpu().numpy()
    return rows


def _top1(scores: Rows, labels: Numbers) -> float:
    right, _ = num_correct(torch.from_numpy(scores), torch.from_numpy(labels))
    return 100 * int(right) / len(labels)
