"""What a classifier answers for each test image: by class, with intervals, and as a file.

Shape letters: M test images that can be read, or of those with several labels the ones with any; C
classes, L labels of an image at most.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoscale.data.sources.classes import Classes, classes_of
from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError
from dinoscale.evaluate.classification.accuracy import are_right
from dinoscale.evaluate.features import check_labels
from dinoscale.evaluate.predictions import (
    COLUMNS,
    FORMATS,
    digest_of_file,
    write_predictions,
)
from dinoscale.runtime import distributed
from dinoscale.runtime.outputs import require_ours

LEVEL = 0.95  # of the intervals
_BETWEEN = " | "  # the classes of an image in a file of predictions


@dataclass(frozen=True)
class Details:
    """What a report says of the answers besides the score.

    Attributes:
        per_class: the accuracy of each class, and the confusion matrix, which images of several
            labels have not.
        predictions: file for the answer of each image, .npz or .csv; None writes none.
    """

    per_class: bool = False
    predictions: str | Path | None = None

    def check(self) -> None:
        """Refuse a file that cannot be written, before a long measurement.

        Raises:
            ConfigError: its format is unknown.
            OutputError: a file that this program did not write is there.
        """
        if self.predictions is None:
            return
        path = Path(self.predictions)
        if path.suffix not in FORMATS:
            raise ConfigError(f"predictions: name a file of {' or '.join(FORMATS)}, not {path}")
        require_ours(path)


NO_DETAILS = Details()


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a classifier.

    Attributes:
        test: the images.
        classes: returns the names of the classes.
        numbers: of the images that could be read, in `test`, (M,) int64.
        labels: class of each, (M,) int64, or its classes (M, L), see `label_lists`.
        answers: class that the classifier gives each, (M,) int64; -1 for none.
    """

    test: Source
    classes: Callable[[], Classes]
    numbers: Tensor
    labels: Tensor
    answers: Tensor

    def report(self, details: Details) -> dict[str, object]:
        """Part of a report, ready for JSON; rank 0 writes the file, and all ranks call it.

        Raises:
            ConfigError: the file cannot be written.
        """
        found: dict[str, object] = {}
        if details.per_class:
            found |= self._by_class()
        if details.predictions is not None:
            path = Path(details.predictions)
            is_first = distributed.rank() == 0
            distributed.together(
                lambda: write_predictions(path, self._columns()) if is_first else None
            )
            found["predictions"] = str(path)
            digest = digest_of_file(path) if is_first else ""
            found["predictions_sha256"] = distributed.broadcast_object(digest)
        return found

    def _by_class(self) -> dict[str, object]:
        """Accuracy of each class that has images, in percent; rows of the matrix are true ones.

        Where images have several labels, the accuracy of a class is that of the images which it is
        a label of. They have no row of a matrix.
        """
        if self.labels.ndim == 2:
            return {"per_class": self._by_any_class()}
        from sklearn.metrics import confusion_matrix

        labels, answers = self.labels.cpu().numpy(), self.answers.cpu().numpy()
        numbers = np.unique(np.concatenate([labels, answers[answers >= 0]]))
        matrix = confusion_matrix(labels, answers, labels=numbers)  # (C, C)
        names, classes = [self.classes().name(number) for number in numbers.tolist()], []
        for i in np.flatnonzero(np.isin(numbers, labels)).tolist():
            images = int((labels == numbers[i]).sum())
            top1 = 100 * int(matrix[i, i]) / images
            classes.append({"class": names[i], "images": images, "top1": top1})
        return {"per_class": classes, "confusion": {"classes": names, "matrix": matrix.tolist()}}

    def _by_any_class(self) -> list[dict[str, object]]:
        correct, classes = are_right(self.answers, self.labels), self.classes()
        found = list[dict[str, object]]()
        for number in self.labels[self.labels >= 0].unique().tolist():
            of_class = (self.labels == number).any(1)
            images, right = int(of_class.sum()), int((of_class & correct).sum())
            name = classes.name(number)
            found.append({"class": name, "images": images, "top1": 100 * right / images})
        return found

    def _columns(self) -> dict[str, NDArray[np.generic]]:
        """Name, class or classes, answer and whether it is right, of each image, (M,) each."""
        above = os.path.join(self.test.root, "") if isinstance(self.test, FolderSource) else ""
        images = [self.test.path(number).removeprefix(above) for number in self.numbers.tolist()]
        labels, answers = self.labels.view(len(self.labels), -1), self.answers[:, None]
        known = self.classes()
        numbers = torch.cat([labels, answers], dim=1).unique().tolist()
        names = {number: known.name(number) for number in numbers if number >= 0}
        named = [
            [
                _BETWEEN.join(names[number] for number in of_image if number >= 0)
                for of_image in rows
            ]
            for rows in (labels.tolist(), answers.tolist())
        ]
        correct = are_right(self.answers, self.labels).cpu().numpy()
        columns = zip(COLUMNS, [*map(_text, [images, *named]), correct], strict=True)
        return dict(columns)


def _text(values: list[str]) -> NDArray[np.str_]:
    """Texts without bytes that no encoding has, as file names may hold."""
    return np.array([value.encode("utf-8", "replace").decode() for value in values], dtype=np.str_)


def classes_of_set(source: Source) -> Callable[[], Classes]:
    """Make a function that returns the classes of a labelled set."""
    return lambda: classes_of(source, check_labels(source, name="train"))


def intervals(score: Mapping[str, float], *, images: int) -> dict[str, list[float]]:
    """95 % intervals of accuracies by the bootstrap over test images, in percent.

    Of images drawn with replacement, the number of right answers is binomial: the quantiles are
    those that infinitely many draws would give. They say how much another test set of this size
    would differ, nothing of another training; and nothing where all or no answers are right.

    Args:
        score: accuracies in percent by name.
        images: of the test set that could be read.
    """
    from scipy.stats import binom

    ends = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    return {
        name: [100 * float(binom.ppf(end, images, min(1.0, value / 100))) / images for end in ends]
        for name, value in score.items()
    }
