"""Two labelled sets, one to learn from and one to judge by, and what a network sees in them.

Shape letters: N images of the bank, M of the test set, as far as they can be read; D width, C
classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoscale import distributed
from dinoscale.data.sources import Source
from dinoscale.errors import DataError
from dinoscale.evaluate.features import check_labels

log = logging.getLogger(__name__)

NAMES_SHOWN = 5  # of classes that only one set has, in an error


class Features(NamedTuple):
    """Of both sets, with labels in the numbers of the bank, on one device."""

    bank: Tensor  # (N, D)
    bank_labels: Tensor  # (N,) int64
    test: Tensor  # (M, D)
    test_labels: Tensor  # (M,) int64


@dataclass(frozen=True)
class LabelledSets:
    """The bank and what to classify; their classes are the same.

    Attributes:
        bank: labelled images to learn from.
        test: labelled images to judge by.
        renumber: (C,) int64, the bank's number of each class of the test set.
    """

    bank: Source
    test: Source
    renumber: Tensor

    @classmethod
    def open(
        cls, train_spec: str, test_spec: str, open_images: Callable[[str], Source]
    ) -> LabelledSets:
        """Open both; all ranks of a job call it, and fail together.

        Args:
            train_spec: the bank, as `data.train` of a config.
            test_spec: what to classify.
            open_images: makes a source of either.

        Raises:
            DataError: as `open_images` and `renumber_classes`.
        """

        def opened() -> LabelledSets:
            bank, test = open_images(train_spec), open_images(test_spec)
            return cls(bank, test, renumber_classes(bank, test))

        return distributed.together(opened)

    def features(self, extract: Callable[[Source], tuple[Tensor, Tensor]]) -> Features:
        """Take features and labels of both.

        Args:
            extract: gives features (N, D) and labels (N,) of the readable images of a source.

        Raises:
            DataError: none of the images of a set can be read.
        """
        bank, bank_labels = _readable(*extract(self.bank), name="train")
        test, labels = _readable(*extract(self.test), name="test")
        return Features(bank, bank_labels, test, self.renumber.to(labels.device)[labels])


def _readable(features: Tensor, labels: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    if not len(features):
        raise DataError(f"{name}: none of the images can be read")
    return features, labels


def renumber_classes(train: Source, test: Source) -> Tensor:
    """Find the number in the bank of every class of the test set: by name, else by number.

    Args:
        train: the bank.
        test: what to classify.

    Returns:
        (C,) int64: position i holds the bank's number of the test set's class i.

    Raises:
        DataError: a set has images without labels, the bank has one class only, the sets name
            different classes, or the test set has a number that the bank lacks.
    """
    of_train = np.unique(check_labels(train, name="train"))
    of_test = np.unique(check_labels(test, name="test"))
    if len(of_train) == 1:
        raise DataError("train: all images are of one class; there is nothing to tell apart")
    if train.class_names is None or test.class_names is None:
        if train.class_names is not test.class_names:
            log.warning("only one of the sets names its classes; matching them by number")
        renumber = np.arange(of_test.max() + 1)
    else:
        only_train = sorted(set(train.class_names) - set(test.class_names))
        only_test = sorted(set(test.class_names) - set(train.class_names))
        if only_train or only_test:
            raise DataError(
                "train and test have different classes: only train has "
                f"{_some(only_train)}; only test has {_some(only_test)}"
            )
        renumber = np.array([train.class_names.index(name) for name in test.class_names])
    missing = np.setdiff1d(renumber[of_test], of_train).tolist()
    if missing:
        raise DataError(f"test has classes that train has no images of: number {_some(missing)}")
    return torch.from_numpy(renumber)


def _some(names: Sequence[object]) -> str:
    more = len(names) - NAMES_SHOWN
    listed = ", ".join(repr(name) for name in names[:NAMES_SHOWN]) or "none"
    return listed + (f" and {more} more" if more > 0 else "")
