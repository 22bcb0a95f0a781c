"""Logistic regression on the patches of a bank.

Shape letters: B patches of the bank, Q patches of images, D width, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinoscale.errors import DataError
from dinoscale.evaluate.segmentation.patch_bank import Bank

HELD_OUT = 10  # every tenth image


class Classifier(NamedTuple):
    """A linear classifier: `weight` (K, D), `bias` (K,); minus infinity for classes not seen."""

    weight: Tensor
    bias: Tensor

    def probabilities(self, features: Tensor) -> Tensor:
        """Of each class, (Q, K), for rows (Q, D)."""
        return F.linear(features, self.weight, self.bias).softmax(dim=1)


class Fitted(NamedTuple):
    """A classifier, and the accuracy of each C on the patches of the held-out images, percent."""

    classifier: Classifier
    c: float
    held_out: dict[str, float]


def fit_bank(bank: Bank, *, num_classes: int, cs: Sequence[float], max_iter: int) -> Fitted:
    """Fit to nine of ten images with each C, and with the best to all of them.

    Args:
        bank: patches of length 1.
        num_classes: K.
        cs: inverse strengths of the L2 penalty, as scikit-learn's C; a single one is not chosen.
        max_iter: of L-BFGS.

    Raises:
        DataError: there is a single image to choose C on, or a single class.
    """
    if len(bank.classes.unique()) < 2:
        raise DataError("train: all patches are of one class; need at least two")
    accuracies: dict[str, float] = {}
    best = cs[0]
    if len(cs) > 1:
        held = _held_out(bank.images).to(bank.classes.device)
        kept = Bank(bank.features[~held], bank.classes[~held], bank.images[~held.cpu()])
        for c in cs:
            tried = _fit(kept, num_classes=num_classes, c=c, max_iter=max_iter)
            right = tried.probabilities(bank.features[held]).argmax(dim=1) == bank.classes[held]
            accuracies[f"{c:g}"] = 100 * float(right.float().mean())
        best = max(
            sorted(cs), key=lambda c: accuracies[f"{c:g}"]
        )  # the strongest penalty of equals
    chosen = _fit(bank, num_classes=num_classes, c=best, max_iter=max_iter)
    return Fitted(chosen, best, accuracies)


def _held_out(images: Tensor) -> Tensor:
    """True for the patches of every tenth image, the second first."""
    names, place = images.unique(return_inverse=True)
    if len(names) < 2:
        raise DataError(
            "train: patches of a single image, none is left to choose C on. Add images, or give"
            " one --c"
        )
    held: Tensor = place % HELD_OUT == 1
    return held


def _fit(bank: Bank, *, num_classes: int, c: float, max_iter: int) -> Classifier:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classes = bank.classes.cpu().numpy()
    if len(np.unique(classes)) < 2:
        raise DataError("train: without every tenth image there is one class only; give one --c")
    model = LogisticRegression(C=c, max_iter=max_iter)
    with warnings.catch_warnings():  # weak penalties take thousands of iterations
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(bank.features.double().cpu().numpy(), classes)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # of two classes scikit-learn scores the second against the first
        weight, bias = np.stack([0 * weight[0], weight[0]]), np.array([0.0, bias[0]])
    features = bank.features
    result = Classifier(
        features.new_zeros(num_classes, features.shape[1]),
        features.new_full((num_classes,), -torch.inf),
    )
    seen = torch.from_numpy(model.classes_).to(features.device)
    result.weight[seen] = torch.from_numpy(weight).to(features)
    result.bias[seen] = torch.from_numpy(bias).to(features)
    return result
