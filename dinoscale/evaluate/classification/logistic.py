"""Logistic regression on frozen features; a part of the train set chooses the regularisation.

The test set is used once, after C was chosen.
Shape letters: N images, D width, C classes.
Source: Caron et al. 2021 (arXiv:2104.14294), appendix on logistic regression; grid, held-out share
and iterations are those of the published code of Oquab et al. 2023 (arXiv:2304.07193).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.classification.accuracy import answers, num_correct, percent
from dinoscale.evaluate.classification.answers import NO_DETAILS, Details
from dinoscale.evaluate.classification.inputs import (
    ClassifierInputs,
    extract_test_features,
    extract_train_features,
    open_inputs,
)
from dinoscale.evaluate.classification.kept_probe import ProbeCard
from dinoscale.evaluate.classification.probe_report import Log, Reporting, Rest, measure_and_report
from dinoscale.evaluate.classification.resumable_training import check_target, save_tensors
from dinoscale.evaluate.frozen_backbone import DEFAULT_EXTRACTION, OUTPUT, ExtractionOptions
from dinoscale.evaluate.progress import bar_options
from dinoscale.runtime import distributed

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

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
    out: str | Path | None = None,
    log_path: str | Path | None = None,
    details: Details = NO_DETAILS,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Fit a logistic regression to frozen features of one set, and test it on another.

    All ranks of a job call it and share the extraction; rank 0 fits.

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
        out: safetensors file for the classifier, see `kept_probe`; None writes nothing.
        log_path: JSON lines, one for each C as soon as it is measured.
        details: what to say of the answers for single images.
        options: which network, which device, and how images are read.

    Returns:
        The report, ready for JSON: `score`, `chosen` (the C and how), `held_out` (all of them).

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the file cannot be written.
        DataError: a set cannot be read or lacks labels, the classes differ, or there is only one.
        NonFiniteError: a feature is not a finite number.
    """
    settings = _Settings(cs, max_iter, seed)
    settings.check()
    details.check()
    target = distributed.together(partial(check_target, out, weights_path))
    inputs = open_inputs(weights_path, train_spec, test_spec, options)
    images = inputs.extractor.preparation
    return measure_and_report(
        "logistic",
        inputs,
        partial(_prepare, inputs, settings, target),
        protocol={"network": options.network, **settings.protocol(), "images": images},
        reporting=Reporting(untrained, log_path, details),
    )


@dataclass(frozen=True)
class _Settings:
    """What is fitted, and which C are tried."""

    cs: Sequence[float]
    max_iter: int
    seed: int

    def check(self) -> None:
        if not self.cs or min(self.cs) <= 0 or self.max_iter < 1 or self.seed < 0:
            given = f"{[*self.cs]}, {self.max_iter}, {self.seed}"
            raise ConfigError(f"need C > 0, max_iter > 0, seed >= 0; got {given}")

    def protocol(self) -> dict[str, object]:
        return {
            "method": "scikit-learn's LogisticRegression, L-BFGS, L2 penalty",
            "features": "backbone output (of a ViT: normalised CLS token), L2-normalised",
            "cs": list(self.cs),
            "max_iter": self.max_iter,
            "held_out": HELD_OUT,
            "seed": self.seed,
            "chosen": "C on a held-out part of the train set; refitted to all of it, tested once",
        }


def _prepare(
    inputs: ClassifierInputs, settings: _Settings, out: Path | None, backbone: nn.Module
) -> Rest:
    """Extract the features of both sets; returns the rest of the measurement."""
    train = _normalised(*extract_train_features(backbone, inputs, output_key=OUTPUT))
    test = _normalised(*extract_test_features(backbone, inputs, output_key=OUTPUT))

    def measure(log: Log) -> dict[str, Any]:
        best, tried = _choose(*train, inputs, settings, log)
        model = fit(*train, c=best["c"], max_iter=settings.max_iter)
        scores = scores_of(model, test[0], num_classes=inputs.num_classes)
        score = _accuracy(scores, test[1], inputs)
        log({"score": score})
        iterations = int(model.n_iter_.max())
        found = {
            "score": score,
            "chosen": best | {"chosen_on": "held-out part of train", "iterations": iterations},
            "held_out": tried,
            "answers": answers(torch.from_numpy(scores)),
        }
        if out is None or backbone is not inputs.backbone:
            return found
        training = inputs.training(settings.protocol())
        _keep(model, inputs, out, {**best, "score": score}, training)
        return found | {"out": str(out)}

    return measure


def _choose(
    train: Rows, labels: Numbers, inputs: ClassifierInputs, settings: _Settings, log: Log
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The best C with its accuracy on the held-out part, and those of all."""
    if len(np.unique(labels)) < 2:
        raise DataError(f"{inputs.specs[0]}: images of only one class can be read; need two")
    held = held_out(labels, seed=settings.seed)
    tried = []
    shown = bar_options(shown=inputs.extractor.options.progress)
    for c in tqdm(settings.cs, unit="C", **shown):
        kept = (train[~held], labels[~held], train[held])
        scores, _ = fit_and_score(*kept, c=c, max_iter=settings.max_iter)
        tried.append({"c": c} | _accuracy(scores, labels[held], inputs))
        log({"held_out": tried[-1]})
    best = max(tried, key=lambda entry: (entry["top1"], -entry["c"]))  # the strongest of equals
    return best, tried


def _keep(
    model: LogisticRegression,
    inputs: ClassifierInputs,
    out: Path,
    measured: Mapping[str, object],
    training: Mapping[str, object],
) -> None:
    """Write the classifier, see `kept_probe`; a class without images never has the best score."""
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # of two classes scikit-learn keeps the second
        weight, bias = np.concatenate([-weight, weight]), np.concatenate([-bias, bias])
    tensors = {
        "weight": torch.zeros(inputs.num_classes, weight.shape[1], dtype=torch.float64),
        "bias": torch.full((inputs.num_classes,), -torch.inf, dtype=torch.float64),
    }
    tensors["weight"][model.classes_] = torch.from_numpy(weight)
    tensors["bias"][model.classes_] = torch.from_numpy(bias)
    of = (inputs.extractor, inputs.backbone, inputs.train)
    card = ProbeCard.of("logistic", *of, measured=measured, training=training, normalised=True)
    save_tensors(out, tensors, card.metadata())


def _normalised(features: torch.Tensor, labels: torch.Tensor) -> tuple[Rows, Numbers]:
    rows = F.normalize(features.double(), dim=1).cpu().numpy()
    return rows, labels.cpu().numpy()


def held_out(labels: Numbers, *, seed: int, share: float = HELD_OUT) -> NDArray[np.bool_]:
    """Choose a share of the images of each class, and of a class of two or more at least one.

    Args:
        labels: (N,).
        seed: of the choice.
        share: 0 < share <= 1/2.

    Returns:
        (N,), true where the image is held out; each class keeps at least one image.

    Raises:
        DataError: each class has a single image.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=np.bool_)
    for number in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == number))
        held[members[: max(round(share * len(members)), int(len(members) > 1))]] = True
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
    model = fit(features, labels, c=c, max_iter=max_iter)
    scores = scores_of(model, tests, num_classes=int(labels.max()) + 1)
    return scores, int(model.n_iter_.max())


def fit(features: Rows, labels: Numbers, *, c: float, max_iter: int) -> LogisticRegression:
    """Fit scikit-learn's logistic regression; arguments as of `fit_and_score`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=max_iter)
    with warnings.catch_warnings():  # the iterations are reported; weak penalties take thousands
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, labels)


def scores_of(model: LogisticRegression, tests: Rows, *, num_classes: int) -> Rows:
    """Scores (M, C) of rows (M, D), minus infinity for classes without an image."""
    found = model.decision_function(tests)
    if found.ndim == 1:  # of two classes scikit-learn scores the second
        found = np.stack([-found, found], axis=1)
    scores = np.full((len(tests), num_classes), -np.inf)
    scores[:, model.classes_] = found
    return scores


def _accuracy(scores: Rows, labels: Numbers, inputs: ClassifierInputs) -> dict[str, float]:
    top1, top5 = num_correct(torch.from_numpy(scores), torch.from_numpy(labels))
    classes = inputs.num_classes
    return percent(int(top1), int(top5), images=len(labels), num_classes=classes)
