"""Two labelled sets, one to learn from and one to test on, and their features.

Shape letters: N readable images of the bank, M of the test set; D width, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoscale.data.sources.classes import classes_of, same_classes
from dinoscale.data.sources.mixture import left_out_counts
from dinoscale.data.sources.source import Source
from dinoscale.errors import DataError
from dinoscale.evaluate.features import check_labels
from dinoscale.evaluate.overlap import find_overlap
from dinoscale.runtime import distributed
from dinoscale.runtime.opening import on_first_rank, open_once_per_node

log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Features of both sets on one device; labels are in the numbers of the bank."""

    bank: Tensor  # (N, D)
    bank_labels: Tensor  # (N,) int64
    test: Tensor  # (M, D)
    test_labels: Tensor  # (M,) int64


@dataclass(frozen=True)
class LabelledSets:
    """A bank and a test set, whose classes are among those of the bank.

    Attributes:
        bank: labelled images to learn from.
        test: labelled images to test on.
        renumber: (C,) int64, the bank's number of each class of the test set, -1 for one without
            images.
    """

    bank: Source
    test: Source
    renumber: Tensor

    @classmethod
    def open(
        cls,
        train_spec: str,
        test_spec: str,
        open_images: Callable[[str, Callable[[], None]], Source],
    ) -> LabelledSets:
        """Open both, once a node; all ranks of a job call it, and fail together.

        Args:
            train_spec: the bank, as `data.train` of a config.
            test_spec: what to classify.
            open_images: opens one of them; takes a function to call while it works.

        Raises:
            DataError: as `open_images` and `renumber_classes`.
        """
        bank = open_once_per_node(partial(open_images, train_spec))
        test = open_once_per_node(partial(open_images, test_spec))
        first = on_first_rank(lambda _: renumber_classes(bank, test))
        renumber = distributed.broadcast_object(first)
        assert renumber is not None
        return cls(bank, test, renumber)

    def features(self, extract: Callable[[Source], tuple[Tensor, Tensor]]) -> Features:
        """Extract features and labels of both.

        Args:
            extract: returns features (N, D) and labels (N,) of the readable images of a source.

        Raises:
            DataError: none of the images of a set can be read.
        """
        bank, bank_labels = _readable(*extract(self.bank), name="train")
        test, labels = _readable(*extract(self.test), name="test")
        test_labels = self.renumber.to(labels.device)[labels]
        lost = set(test_labels.tolist()) - set(bank_labels.tolist())
        if lost:
            log.warning("train: no image can be read of %d classes that test has", len(lost))
        return Features(bank, bank_labels, test, test_labels)


def _readable(features: Tensor, labels: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    if not len(features):
        raise DataError(f"{name}: none of the images can be read")
    return features, labels


def labels_of(source: Source, numbers: Tensor, *, name: str) -> Tensor:
    """Labels of some images of a set, (N,) int64, on the device of their numbers (N,).

    Raises:
        DataError: as `check_labels`, which takes the name.
    """
    return torch.from_numpy(check_labels(source, name=name))[numbers.cpu()].to(numbers.device)


def describe_set(
    spec: str, source: Source, labels: Tensor, *, unreadable: int
) -> dict[str, object]:
    """Describe the used images of a set for a report.

    Args:
        spec: what it was opened from.
        source: the set.
        labels: of the images that were used, (N,).
        unreadable: number of images that could not be read.
    """
    return {
        "spec": spec,
        "images": len(labels),
        "unreadable": unreadable,
        "left_out": left_out_counts(source),
        "classes": len(labels.unique()),
    }


def renumber_classes(train: Source, test: Source) -> Tensor:
    """Find the number in the bank of every class of the test set: by name, else by number.

    Classes that the test set lacks are no error. Logs them, and how many pictures both sets share.

    Args:
        train: the bank.
        test: what to classify.

    Returns:
        (C,) int64: position i holds the bank's number of the test set's class i, -1 if that has no
        images.

    Raises:
        DataError: a set has images without labels, the bank has one class only, or as
            `classes_of` and `same_classes`.
    """
    labels = [check_labels(train, name="train"), check_labels(test, name="test")]
    of_train, of_test = classes_of(train, labels[0]), classes_of(test, labels[1])
    if len(of_train.present) == 1:
        raise DataError("train: all images are of one class; need at least two")
    same = same_classes(of_train, of_test)
    if len(same) < len(of_train.present):
        log.info("test has images of %d of the %d classes", len(same), len(of_train.present))
    shared = find_overlap(test, train) if distributed.rank() == 0 else None
    if shared is not None and shared.found:
        log.warning(
            "%d of the %d pictures of test that were looked for are in train, byte for byte, as %s:"
            " the accuracy is too high",
            *(shared.found, shared.looked_for, shared.example),
        )
    renumber = np.full(max(same) + 1, -1, dtype=np.int64)
    renumber[list(same)] = list(same.values())
    return torch.from_numpy(renumber)
