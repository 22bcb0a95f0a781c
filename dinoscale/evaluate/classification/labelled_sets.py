"""Two labelled sets, one to learn from and one to test on, and their features.

Shape letters: N readable images of the bank, M counted ones of the test set; D width, C classes,
L classes of an image at most.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoscale.data.sources.classes import Classes, classes_of, same_classes
from dinoscale.data.sources.mixture import left_out_counts
from dinoscale.data.sources.source import Source
from dinoscale.errors import DataError
from dinoscale.evaluate.features import check_labels
from dinoscale.evaluate.label_lists import LabelLists, read_label_lists, with_a_class
from dinoscale.evaluate.overlap import find_overlap
from dinoscale.runtime import distributed
from dinoscale.runtime.opening import on_first_rank, open_once_per_node

log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Features of both sets on one device; labels are in the numbers of the bank."""

    bank: Tensor  # (N, D)
    bank_labels: Tensor  # (N,) int64
    test: Tensor  # (M, D)
    test_labels: Tensor  # (M,) int64, or (M, L) of `LabelLists`
    test_numbers: Tensor  # of the images in the test set, (M,) int64
    without_label: int = 0  # images of the test set that can be read and are not counted


@dataclass(frozen=True)
class LabelledSets:
    """A bank and a test set, whose classes are among those of the bank.

    Attributes:
        bank: labelled images to learn from.
        test: labelled images to test on.
        renumber: (C,) int64, the bank's number of each class of the test set, -1 for one without
            images; of no class if there are lists.
        lists: several classes for each image of the test set, instead of its own.
    """

    bank: Source
    test: Source
    renumber: Tensor
    lists: LabelLists | None = None

    @classmethod
    def open(
        cls,
        train_spec: str,
        test_spec: str,
        open_images: Callable[[str, Callable[[], None]], Source],
        *,
        labels_path: str | Path | None = None,
    ) -> LabelledSets:
        """Open both, once a node; all ranks of a job call it, and fail together.

        Args:
            train_spec: the bank, as `data.train` of a config.
            test_spec: what to classify.
            open_images: opens one of them; takes a function to call while it works.
            labels_path: file with several classes for each test image, see `label_lists`.

        Raises:
            DataError: as `open_images`, `renumber_classes` and `read_label_lists`.
        """
        bank = open_once_per_node(partial(open_images, train_spec))
        test = open_once_per_node(partial(open_images, test_spec))

        def compare() -> tuple[Tensor, LabelLists | None]:
            if labels_path is None:
                return renumber_classes(bank, test), None
            classes = _classes_of_bank(bank)
            _warn_of_overlap(test, bank)
            lists = read_label_lists(labels_path, test, test_spec, classes)
            return torch.zeros(0, dtype=torch.int64), lists

        found = distributed.broadcast_object(on_first_rank(lambda _: compare()))
        assert found is not None
        return cls(bank, test, *found)

    def features(self, extract: Callable[[Source], tuple[Tensor, Tensor]]) -> Features:
        """Extract features of both, and look their labels up.

        Args:
            extract: returns features (N, D) of the readable images of a source, and their numbers
                in it (N,).

        Raises:
            DataError: none of the images of a set can be read, or none has a label.
        """
        bank, of_bank = _readable(*extract(self.bank), name="train")
        bank_labels = labels_of(self.bank, of_bank, name="train")
        test, numbers = _readable(*extract(self.test), name="test")
        found, without = len(test), 0
        if self.lists is None:
            labels = labels_of(self.test, numbers, name="test")
            test_labels = self.renumber.to(labels.device)[labels]
        else:
            test_labels = self.lists.of(numbers)
            counted = with_a_class(test_labels)
            test, test_labels, numbers = test[counted], test_labels[counted], numbers[counted]
            without = found - len(test)
        lost = set(test_labels[test_labels >= 0].tolist()) - set(bank_labels.tolist())
        if lost:
            log.warning("train: no image can be read of %d classes that test has", len(lost))
        return Features(bank, bank_labels, test, test_labels, numbers, without)

    def describe_test(self, spec: str, features: Features) -> dict[str, object]:
        """Describe the test set for a report, as `describe_set`."""
        unreadable = len(self.test) - len(features.test) - features.without_label
        labels = features.test_labels
        return describe_set(spec, self.test, labels, unreadable=unreadable, lists=self.lists)


def _readable(features: Tensor, numbers: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    if not len(features):
        raise DataError(f"{name}: none of the images can be read")
    return features, numbers


def labels_of(source: Source, numbers: Tensor, *, name: str) -> Tensor:
    """Labels of some images of a set, (N,) int64, on the device of their numbers (N,).

    Raises:
        DataError: as `check_labels`, which takes the name.
    """
    return torch.from_numpy(check_labels(source, name=name))[numbers.cpu()].to(numbers.device)


def describe_set(
    spec: str,
    source: Source,
    labels: Tensor,
    *,
    unreadable: int,
    lists: LabelLists | None = None,
) -> dict[str, object]:
    """Describe the used images of a set for a report.

    Args:
        spec: what it was opened from.
        source: the set.
        labels: of the images that were used, (N,), or (N, L) of lists.
        unreadable: number of images that could not be read.
        lists: where the labels are from a file.
    """
    about: dict[str, object] = {
        "spec": spec,
        "images": len(labels),
        "unreadable": unreadable,
        "left_out": left_out_counts(source),
        "classes": len(labels[labels >= 0].unique()),
    }
    if lists is None:
        return about
    without = len(source) - unreadable - len(labels)
    return about | {
        "labels_sha256": lists.sha256,
        "own_class_among_labels": lists.own_class_share,
        "without_label": without,
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
    of_train = _classes_of_bank(train)
    same = same_classes(of_train, classes_of(test, check_labels(test, name="test")))
    if len(same) < len(of_train.present):
        log.info("test has images of %d of the %d classes", len(same), len(of_train.present))
    _warn_of_overlap(test, train)
    renumber = np.full(max(same) + 1, -1, dtype=np.int64)
    renumber[list(same)] = list(same.values())
    return torch.from_numpy(renumber)


def _classes_of_bank(train: Source) -> Classes:
    classes = classes_of(train, check_labels(train, name="train"))
    if len(classes.present) == 1:
        raise DataError("train: all images are of one class; need at least two")
    return classes


def _warn_of_overlap(test: Source, train: Source) -> None:
    shared = find_overlap(test, train) if distributed.rank() == 0 else None
    if shared is not None and shared.found:
        log.warning(
            "%d of the %d pictures of test that were looked for are in train, byte for byte, as %s:"
            " the accuracy is too high",
            *(shared.found, shared.looked_for, shared.example),
        )
