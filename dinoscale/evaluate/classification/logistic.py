"""Logistic regression on frozen features; a part of the train set chooses the regularisation.

The test set is used once, after C was chosen.
Shape letters: N images, D width, C classes.
Source: Caron et al. 2021 (arXiv:2104.14294), appendix on logistic regression; grid, held-out share
and iterations are those of the published code of Oquab et al. 2023 (arXiv:2304.07193).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.classification.accuracy import num_correct, percent
from dinoscale.evaluate.classification.inputs import (
    ClassifierInputs,
    extract_test_features,
    extract_train_features,
    open_inputs,
)
from dinoscale.evaluate.classification.probe_report import Log, measure_and_report
from dinoscale.evaluate.frozen_backbone import DEFAULT_EXTRACTION, OUTPUT, ExtractionOptions
from dinoscale.evaluate.progress import bar_options

CS = tuple((10 ** np.linspace(-6, 5, 45)).tolist())  # inverse strength of the L2 penalty
HELD_OUT = 0.1  # of the images of each class, at least one of a class of two or more
MAX_ITER = 1000  # of L-BFGS

Rows = NDArray[np.float64]  # (N, D)
Numbers = NDArray[np.int64]  # (N,)


def evaluate_logistic(
    weights_path: str | Path,
    train_spec: str,
    test_spec: str,
    *,
    cs: Sequence[float] = CS,
    max_iter: int = MAX_ITER,
    seed: int = 0,
    untrained: bool = False,
    log_path: str | Path | None = None,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Fit a logistic regression to frozen features of one set, and test it on another.

    Features are the backbone's output (of a ViT: the normalised class token), without
    augmentation, scaled to length 1.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        train_spec: labelled images, as `data.train` of a config.
        test_spec: labelled images of the same classes.
        cs: inverse strengths of the penalty to choose from, as scikit-learn's C.
        max_iter: of L-BFGS.
        seed: of the held-out part, >= 0.
        untrained: also measure the same architecture with fresh weights.
        log_path: JSON lines, one for each C as soon as it is measured.
        options: which network, which device, and how images are read.

    Returns:
        The report, ready for JSON: `score`, `chosen` (the C and how), `held_out` (all of them).

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range.
        DataError: a set cannot be read or lacks labels, the classes differ, or there is only one.
        NonFiniteError: a feature is not a finite number.
    """
    if not cs or min(cs) <= 0 or max_iter < 1 or seed < 0:
        raise ConfigError(f"need C > 0, max_iter > 0, seed >= 0; got {[*cs]}, {max_iter}, {seed}")
    inputs = open_inputs(weights_path, train_spec, test_spec, options)
    return measure_and_report(
        "logistic",
        inputs,
        partial(_measure, inputs, cs=cs, max_iter=max_iter, seed=seed),
        protocol={
            "network": options.network,
            "method": "scikit-learn's LogisticRegression, L-BFGS, L2 penalty",
            "features": "backbone output (of a ViT: normalised CLS token), L2-normalised",
            "cs": list(cs),
            "max_iter": max_iter,
            "held_out": HELD_OUT,
            "seed": seed,
            "chosen": "C on a held-out part of the train set; refitted to all of it, tested once",
            "images": inputs.extractor.preparation,
        },
        untrained=untrained,
        log_path=log_path,
    )


def _measure(
    inputs: ClassifierInputs,
    backbone: nn.Module,
    log: Log,
    *,
    cs: Sequence[float],
    max_iter: int,
    seed: int,
) -> dict[str, object]:
    """Score, chosen C, and the accuracy of each C on the held-out part."""
    train, labels = _normalised(*extract_train_features(backbone, inputs, output_key=OUTPUT))
    if len(np.unique(labels)) < 2:
        raise DataError(f"{inputs.specs[0]}: images of only one class can be read; need two")
    held = held_out(labels, seed=seed)
    tried = []
    for c in tqdm(cs, unit="C", **bar_options(shown=inputs.extractor.options.progress)):
        scores, _ = fit_and_score(train[~held], labels[~held], train[held], c=c, max_iter=max_iter)
        tried.append({"c": c} | _accuracy(scores, labels[held], inputs))
        log({"held_out": tried[-1]})
    best = max(tried, key=lambda entry: entry["top1"])  # the strongest penalty of equals
    test, test_labels = _normalised(*extract_test_features(backbone, inputs, output_key=OUTPUT))
    scores, iterations = fit_and_score(train, labels, test, c=best["c"], max_iter=max_iter)
    score = _accuracy(scores, test_labels, inputs)
    log({"score": score})
    return {
        "score": score,
        "chosen": best | {"chosen_on": "held-out part of train", "iterations": iterations},
        "held_out": tried,
    }


def _normalised(features: torch.Tensor, labels: torch.Tensor) -> tuple[Rows, Numbers]:
    rows = F.normalize(features.double(), dim=1).cpu().numpy()
    return rows, labels.cpu().numpy()


def held_out(labels: Numbers, *, seed: int) -> NDArray[np.bool_]:
    """Choose a tenth of the images of each class, and of a class of two or more at least one.

    Args:
        labels: (N,).
        seed: of the choice.

    Returns:
        (N,), true where the image is held out; each class keeps at least one image.

    Raises:
        DataError: each class has a single image.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=np.bool_)
    for number in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == number))
        held[members[: max(round(HELD_OUT * len(members)), int(len(members) > 1))]] = True
    if not held.any():
        raise DataError("train: every class has a single image, none is left to choose C on")
    return held


def fit_and_score(
    features: Rows, labels: Numbers, tests: Rows, *, c: float, max_iter: int
) -> tuple[Rows, int]:
    """Fit scikit-learn's logistic regression and score other images.

    Args:
        features: (N, D).
        labels: (N,), of at least two classes.
        tests: (M, D).
        c: inverse strength of the penalty.
        max_iter: of L-BFGS.

    Returns:
        Scores (M, C) for class numbers from 0 to the highest, minus infinity for those without an
        image; the number of iterations.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=max_iter)
    with warnings.catch_warnings():  # the iterations are reported; weak penalties take thousands
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    found = model.decision_function(tests)
    if found.ndim == 1:  # of two classes scikit-learn scores the second
        found = np.stack([-found, found], axis=1)
    scores = np.full((len(tests), int(labels.max()) + 1), -np.inf)
    scores[:, model.classes_] = found
    return scores, int(model.n_iter_.max())


def _accuracy(scores: Rows, labels: Numbers, inputs: ClassifierInputs) -> dict[str, float]:
    top1, top5 = num_correct(torch.from_numpy(scores), torch.from_numpy(labels))
    classes = inputs.num_classes
    return percent(int(top1), int(top5), images=len(labels), num_classes=classes)
