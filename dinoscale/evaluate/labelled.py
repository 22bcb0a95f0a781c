"""Two labelled sets, one to learn from and one to judge by, and what a network sees in them.

Shape letters: N images of the bank, M of the test set, as far as they can be read; D width, C
classes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoscale import distributed
from dinoscale.data.classes import classes_of, same_classes
from dinoscale.data.decode import BadSampleError
from dinoscale.data.folder import FolderSource
from dinoscale.data.shards import TarSource
from dinoscale.data.sources import Source
from dinoscale.errors import DataError
from dinoscale.evaluate.features import check_labels
from dinoscale.opening import on_first_rank, open_once_a_node

log = logging.getLogger(__name__)

_LOOKED_FOR = 64  # pictures of one set in the other: one copied half is found, some copies may not
_COMPARED = 512  # files of the same name or size, of which few have the same bytes


class Features(NamedTuple):
    """Of both sets, with labels in the numbers of the bank, on one device."""

    bank: Tensor  # (N, D)
    bank_labels: Tensor  # (N,) int64
    test: Tensor  # (M, D)
    test_labels: Tensor  # (M,) int64


@dataclass(frozen=True)
class LabelledSets:
    """The bank and what to classify, whose classes are among those of the bank.

    Attributes:
        bank: labelled images to learn from.
        test: labelled images to judge by.
        renumber: (C,) int64, the bank's number of each class of the test set, -1 of one without
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
            open_images: makes a source of either; takes what it calls while it works.

        Raises:
            DataError: as `open_images` and `renumber_classes`.
        """
        bank = open_once_a_node(partial(open_images, train_spec))
        test = open_once_a_node(partial(open_images, test_spec))
        first = on_first_rank(lambda _: renumber_classes(bank, test))
        renumber = distributed.broadcast_object(first)
        assert renumber is not None
        return cls(bank, test, renumber)

    def features(self, extract: Callable[[Source], tuple[Tensor, Tensor]]) -> Features:
        """Take features and labels of both.

        Args:
            extract: gives features (N, D) and labels (N,) of the readable images of a source.

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


def renumber_classes(train: Source, test: Source) -> Tensor:
    """Find the number in the bank of every class of the test set: by name, else by number.

    Classes that the test set lacks are no error. Says so, and warns where the sets share files.

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
        raise DataError("train: all images are of one class; there is nothing to tell apart")
    same = same_classes(of_train, of_test)
    if len(same) < len(of_train.present):
        log.info("test has images of %d of the %d classes", len(same), len(of_train.present))
    if shared := _shared(train, test):
        log.warning("%s is in train and in test: images are judged by themselves", shared)
    renumber = np.full(max(same) + 1, -1, dtype=np.int64)
    renumber[list(same)] = list(same.values())
    return torch.from_numpy(renumber)


def _shared(train: Source, test: Source) -> str:
    """A folder, shard or picture that both sets hold; empty if none shows.

    Of copies that shows where some pictures of the test set are files of the same name or, in
    shards, of the same size, and of the same bytes.
    """
    if isinstance(train, TarSource) and isinstance(test, TarSource):
        of_train = {os.path.realpath(path) for path in train.files()}
        if same := [path for path in test.files() if os.path.realpath(path) in of_train]:
            return same[0]
    if isinstance(train, FolderSource) and isinstance(test, FolderSource):
        roots = [os.path.realpath(train.root), os.path.realpath(test.root)]
        if os.path.commonpath(roots) in roots:
            return max(roots, key=len)
    if isinstance(train, FolderSource | TarSource) and isinstance(test, FolderSource | TarSource):
        if len(train) == len(test) and train.identity() == test.identity():
            return test.path(0)
        sizes_of_test = isinstance(train, FolderSource) and isinstance(test, TarSource)
        return _copied(test, train) if sizes_of_test else _copied(train, test)
    return test.path(0) if test == train else ""  # a drawn set


def _copied(whole: FolderSource | TarSource, other: FolderSource | TarSource) -> str:
    """One of some pictures of a set that is in the other, whose names, or sizes, are all read."""
    some = range(0, len(other), -(-len(other) // _LOOKED_FOR))
    wanted: dict[str | int, list[int]] = {}
    for index in some:
        key = other.size(index) if isinstance(whole, TarSource) else _base(other.path(index))
        wanted.setdefault(key, []).append(index)
    keys: Iterable[str | int]
    keys = whole.sizes() if isinstance(whole, TarSource) else map(_base, whole.files())
    pairs = ((i, index) for i, key in enumerate(keys) for index in wanted.get(key, []))
    for i, index in islice(pairs, _COMPARED):
        if whole.size(i) == other.size(index) and _bytes(whole, i) == _bytes(other, index) != b"":
            return other.path(index)
    return ""


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _bytes(source: FolderSource | TarSource, index: int) -> bytes:
    """The file of a picture; empty where it cannot be read."""
    try:
        return source.data(index)
    except BadSampleError:
        return b""
