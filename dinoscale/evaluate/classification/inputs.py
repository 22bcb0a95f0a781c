"""Inputs of every classifier: a backbone and two labelled sets of the same classes.

Shape letters: N images, C classes (channels in images), H rows and columns of a crop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dinoscale.convert.card import BackboneCard
from dinoscale.data.augmentation.color_jitter import finish_crops
from dinoscale.data.augmentation.labelled_crops import labelled_crops
from dinoscale.data.augmentation.multi_crop import Interpolation
from dinoscale.data.sources.classes import classes_of
from dinoscale.data.sources.source import Source
from dinoscale.data.transfer import to_device
from dinoscale.errors import DataError
from dinoscale.evaluate.classification.answers import Answers, classes_of_set
from dinoscale.evaluate.classification.labelled_sets import (
    LabelledSets,
    describe_set,
    labels_of,
)
from dinoscale.evaluate.feature_cache import InFiles
from dinoscale.evaluate.features import check_labels
from dinoscale.evaluate.frozen_backbone import (
    ExtractionOptions,
    FeatureExtractor,
    load_extractor,
)
from dinoscale.runtime.fingerprint import digest_of, files_fingerprint

# What the digest of a train set in files compares, for cards.
TRAIN_DIGEST = "order, names and sizes of the files, and labels; not their contents"


@dataclass(frozen=True)
class ClassifierInputs:
    """A backbone, and the labelled sets to train and to test a classifier on.

    Attributes:
        extractor: the backbone, and how test images are read.
        train: labelled images to learn from.
        test: labelled images to test on.
        specs: what `train` and `test` were opened from.
        num_classes: C, of the train set.
        renumber: the train set's number of each class of the test set, (C',) int64.
        used: what was used of `train` and `test` so far, by these names.
    """

    extractor: FeatureExtractor
    train: Source
    test: Source
    specs: tuple[str, str]
    num_classes: int
    renumber: Tensor
    used: dict[str, UsedImages] = field(default_factory=dict)

    @property
    def backbone(self) -> nn.Module:
        """The backbone, on `device`, in eval mode, without gradients."""
        return self.extractor.backbone

    @cached_property
    def files(self) -> dict[str, object]:
        """Fingerprints of the files of `train` and `test`, and of the classes of their images.

        Of synthetic images their spec. Which number is which class, files beside shards may say.

        Raises:
            DataError: such a file can no longer be read.
            UnavailableError: the file system of a set failed for a minute.
        """
        files: dict[str, object] = {}
        classes = []
        sets = zip(("train", "test"), self.specs, (self.train, self.test), strict=True)
        for name, spec, source in sets:
            classes.append(asdict(classes_of(source, check_labels(source, name=name))))
            files[name] = spec
            if isinstance(source, InFiles):
                files[name] = files_fingerprint("", source.files())
        return {**files, "classes": digest_of([*classes, self.renumber.tolist()])}

    def training(self, protocol: Mapping[str, object]) -> dict[str, object]:
        """What a classifier was made from besides the backbone, for its card.

        Of the train set the order of its images, sizes and names of their files, and labels: a copy
        of the set elsewhere makes the same card. So do images that were edited and kept their size:
        cached features need no image, and hashing would read all. The card says it.
        """
        compared = TRAIN_DIGEST if isinstance(self.train, InFiles) else "the name of the set"
        digest = {"train": digest_of(self._train_images()), "train_digest_of": compared}
        return digest | dict(protocol)

    def _train_images(self) -> object:
        found, labels = self.files["train"], check_labels(self.train, name="train")
        if not isinstance(self.train, InFiles) or not isinstance(found, dict):
            return found
        paths = list(self.train.files())
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = [os.path.relpath(path, folder) for path in paths]
        return {
            "number": found["number"],
            "sizes": found["sizes"],
            "names": digest_of(names),
            "labels": digest_of(labels.tolist()),
        }

    def answers(self, classes: Tensor) -> Answers:
        """The classes that a classifier gives the test images that were used, (N,) int64."""
        test = self.used["test"]
        labels = self.renumber[test.labels.cpu()]
        return Answers(
            self.test, classes_of_set(self.train), test.numbers.cpu(), labels, classes.cpu()
        )

    def describe(self) -> dict[str, dict[str, object]]:
        """The images of both sets that were used, for a report."""
        sets = zip(("train", "test"), self.specs, (self.train, self.test), strict=True)
        return {
            name: describe_set(
                spec, source, self.used[name].labels, unreadable=self.used[name].unreadable
            )
            for name, spec, source in sets
        }

    @property
    def card(self) -> BackboneCard:
        """How the images of the backbone are prepared."""
        return self.extractor.card

    @property
    def device(self) -> torch.device:
        """Where the backbone computes."""
        return self.extractor.device


@dataclass(frozen=True)
class UsedImages:
    """The images of a set that were used.

    Attributes:
        numbers: of these images in the set, (N,) int64.
        labels: of these images, (N,) int64, in the set's numbers.
        unreadable: number of images that could not be read.
    """

    numbers: Tensor
    labels: Tensor
    unreadable: int


class DrawnImages:
    """The images of a train set that were drawn so far.

    Attributes:
        read: (N,) bool.
        unreadable: (N,) bool.
    """

    def __init__(self, images: int) -> None:
        self.read = torch.zeros(images, dtype=torch.bool)
        self.unreadable = torch.zeros(images, dtype=torch.bool)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> DrawnImages:
        """Restore from what `state` returned."""
        drawn = cls(0)
        drawn.read, drawn.unreadable = state["read"].cpu(), state["unreadable"].cpu()
        return drawn

    def state(self) -> dict[str, Tensor]:
        """The state to keep in a checkpoint, which `of` restores."""
        return {"read": self.read, "unreadable": self.unreadable}

    def used(self, source: Source) -> UsedImages:
        """Labels and number of these images of the train set."""
        numbers = self.read.nonzero().flatten()
        labels = labels_of(source, numbers, name="train")
        return UsedImages(numbers, labels, int(self.unreadable.sum()))


def open_inputs(
    weights_path: str | Path, train_spec: str, test_spec: str, options: ExtractionOptions
) -> ClassifierInputs:
    """Load weights and open both sets.

    Args:
        weights_path: any weights that `load_backbone` reads.
        train_spec: as `data.train` of a config; a subfolder a class, or shards with class numbers.
        test_spec: likewise; its classes must be among those of the train set.
        options: which network, which device, and how test images are read.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: there is no such device.
        DataError: a set cannot be read or lacks labels, the classes differ, or there is only one.
    """
    extractor = load_extractor(weights_path, options)
    sets = LabelledSets.open(train_spec, test_spec, extractor.open)
    return ClassifierInputs(
        extractor=extractor,
        train=sets.bank,
        test=sets.test,
        specs=(train_spec, test_spec),
        num_classes=int(check_labels(sets.bank, name="train").max()) + 1,
        renumber=sets.renumber,
    )


def extract_train_features(
    network: nn.Module, inputs: ClassifierInputs, *, output_key: str | None
) -> tuple[Tensor, Tensor]:
    """Outputs of the network for the train set without augmentation; as `extract_test_features`.

    Both record in `inputs.used` which images could be read.
    """
    return _features(network, inputs, "train", output_key=output_key)


def extract_test_features(
    network: nn.Module, inputs: ClassifierInputs, *, output_key: str | None, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Outputs of the network for the test set.

    Args:
        network: the backbone, or a module around it.
        inputs: whose images these are.
        output_key: what the network computes from the backbone, in words, for the cache; None where
            its weights change, so that caching is useless.
        progress: draw a bar, if the options do.

    Returns:
        Outputs (N, D) float32, and labels (N,) int64 in the train set's numbers, on the device.

    Raises:
        DataError: none of the images can be read.
        NonFiniteError: an output is not a finite number.
    """
    outputs, labels = _features(network, inputs, "test", output_key=output_key, progress=progress)
    return outputs, inputs.renumber.to(labels.device)[labels]


def _features(
    network: nn.Module,
    inputs: ClassifierInputs,
    name: Literal["train", "test"],
    *,
    output_key: str | None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    source = inputs.train if name == "train" else inputs.test
    outputs, numbers = inputs.extractor.unlabelled(
        source, network, output_key=output_key, progress=progress
    )
    if not len(outputs):
        spec = inputs.specs[name == "test"]
        raise DataError(f"{spec}: none of the images can be read")
    labels = labels_of(source, numbers, name=name)
    inputs.used[name] = UsedImages(numbers, labels, len(source) - len(labels))
    return outputs, labels


def train_images(
    inputs: ClassifierInputs,
    *,
    interpolation: Interpolation,
    batch_size: int,
    steps: int,
    first_step: int,
    seed: int,
    num_workers: int,
    drawn: DrawnImages,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented batches of the train set, which depend on seed and step alone.

    Args:
        inputs: whose images these are.
        interpolation: of the crops.
        batch_size: images of a step.
        steps: number of batches, those before the first one included.
        first_step: begin with the batch of this step.
        seed: of order and crops.
        num_workers: processes that decode images.
        drawn: records the images of the batches.

    Returns:
        Images (N, C, H, H) float32, cropped at random, mirrored or not, normalised; labels (N,)
        int64; both on the device.
    """
    card = inputs.card
    batches = labelled_crops(
        inputs.train,
        size=card.crop,
        interpolation=interpolation,
        batch_size=batch_size,
        steps=steps,
        first_step=first_step,
        seed=seed,
        num_workers=num_workers,
        pin_memory=inputs.device.type == "cuda",
    )
    for batch in batches:
        drawn.read[batch.ids] = True
        drawn.unreadable[batch.unreadable] = True
        crops = to_device(batch.crops, inputs.device)
        images = finish_crops(crops, batch.params, mean=card.mean, std=card.std, compiled=False)
        yield images, to_device(batch.labels, inputs.device)
