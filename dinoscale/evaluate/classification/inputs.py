"""What all classifiers start from: a backbone and two labelled sets of the same classes.

Shape letters: N images, C classes (channels in images), H rows and columns of a crop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dinoscale.convert.card import BackboneCard
from dinoscale.data.augmentation.color_jitter import finish_crops
from dinoscale.data.augmentation.labelled_crops import labelled_crops
from dinoscale.data.augmentation.multi_crop import Interpolation
from dinoscale.data.sources.source import Source
from dinoscale.data.transfer import to_device
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.classification.labelled_sets import LabelledSets
from dinoscale.evaluate.features import check_labels, extract_features
from dinoscale.evaluate.frozen_backbone import Extraction, open_frozen, taken_of


@dataclass(frozen=True)
class Reading:
    """How images are read and forwarded; none of it changes a number.

    Attributes:
        batch_size: images of one forward without gradients.
        num_workers: processes that decode images; 0 decodes in this one.
        cache: read outputs that are kept from an earlier run, and keep those made.
        progress: draw bars on stderr, if that is a terminal.
    """

    batch_size: int = 64
    num_workers: int = 4
    cache: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.batch_size < 1 or self.num_workers < 0:
            raise ConfigError(
                "need batch_size > 0 and num_workers >= 0, got "
                f"{self.batch_size} and {self.num_workers}"
            )


READING = Reading()


@dataclass(frozen=True)
class Subject:
    """A backbone on its device, and the sets to judge it by.

    Attributes:
        weights: path of its file.
        backbone: in eval mode, without gradients.
        card: how to prepare its images.
        device: where it computes.
        train: labelled images to learn from.
        test: labelled images to judge by.
        specs: what `train` and `test` were opened from.
        num_classes: C, of the train set.
        renumber: the train set's number of each class of the test set, (C',) int64.
        used: what was used of `train` and `test` so far, by these names.
    """

    weights: str
    backbone: nn.Module
    card: BackboneCard
    device: torch.device
    train: Source
    test: Source
    specs: tuple[str, str]
    num_classes: int
    renumber: Tensor
    used: dict[str, Used] = field(default_factory=dict)


@dataclass(frozen=True)
class Used:
    """What of a set was used.

    Attributes:
        labels: of the images that were, (N,) int64.
        unreadable: how many could not be.
    """

    labels: Tensor
    unreadable: int


class Drawn:
    """Which images of a train set were drawn so far.

    Attributes:
        read: (N,) bool.
        unreadable: (N,) bool.
    """

    def __init__(self, images: int) -> None:
        self.read = torch.zeros(images, dtype=torch.bool)
        self.unreadable = torch.zeros(images, dtype=torch.bool)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Drawn:
        """What was drawn before, of `state`."""
        drawn = cls(0)
        drawn.read, drawn.unreadable = state["read"].cpu(), state["unreadable"].cpu()
        return drawn

    def state(self) -> dict[str, Tensor]:
        """What `of` takes."""
        return {"read": self.read, "unreadable": self.unreadable}

    def used(self, source: Source) -> Used:
        """What of the train set this is."""
        labels = torch.from_numpy(check_labels(source, name="train"))
        return Used(labels[self.read], int(self.unreadable.sum()))


def open_subject(
    weights_path: str | Path, train_spec: str, test_spec: str, how: Extraction
) -> Subject:
    """Load weights and open both sets.

    Args:
        weights_path: any weights that `load_backbone` reads.
        train_spec: as `data.train` of a config; a subfolder a class, or shards with class numbers.
        test_spec: likewise; its classes must be among those of the train set.
        how: to open the weights: network, num_heads, device.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: there is no such device.
        DataError: a set cannot be read or lacks labels, the classes differ, or there is only one.
    """
    frozen = open_frozen(weights_path, how)
    sets = LabelledSets.open(train_spec, test_spec, frozen.open)
    return Subject(
        weights=str(weights_path),
        backbone=frozen.backbone,
        card=frozen.card,
        device=frozen.device,
        train=sets.bank,
        test=sets.test,
        specs=(train_spec, test_spec),
        num_classes=int(check_labels(sets.bank, name="train").max()) + 1,
        renumber=sets.renumber,
    )


def outputs_of_train(
    network: nn.Module, subject: Subject, reading: Reading, *, taken: str | None
) -> tuple[Tensor, Tensor]:
    """What the network makes of the train set without augmentation; as `outputs_of_test`.

    Both keep in `subject.used` what of the set could be read.
    """
    return _outputs(network, subject, "train", reading, taken=taken)


def outputs_of_test(
    network: nn.Module, subject: Subject, reading: Reading, *, taken: str | None
) -> tuple[Tensor, Tensor]:
    """What the network makes of the test set.

    Args:
        network: the subject's backbone, or around it.
        subject: whose images these are.
        reading: how they are read.
        taken: what the network makes of the backbone, in words, for the cache; None where its
            weights change, so that nothing is worth keeping.

    Returns:
        Outputs (N, D) float32, and labels (N,) int64 in the train set's numbers, on the device.

    Raises:
        DataError: none of the images can be read.
        NonFiniteError: an output is not a finite number.
    """
    outputs, labels = _outputs(network, subject, "test", reading, taken=taken)
    return outputs, subject.renumber.to(labels.device)[labels]


def _outputs(
    network: nn.Module,
    subject: Subject,
    name: Literal["train", "test"],
    reading: Reading,
    *,
    taken: str | None,
) -> tuple[Tensor, Tensor]:
    card, source = subject.card, getattr(subject, name)
    outputs, labels = extract_features(
        network,
        source,
        resize=card.resize,
        crop=card.crop,
        mean=card.mean,
        std=card.std,
        batch_size=reading.batch_size,
        device=subject.device,
        num_workers=reading.num_workers,
        taken=taken_of(card, taken) if taken and reading.cache else None,
        progress=reading.progress,
    )
    if not len(outputs):
        spec = subject.specs[name == "test"]
        raise DataError(f"{spec}: none of the images can be read")
    subject.used[name] = Used(labels, len(source) - len(labels))
    return outputs, labels


def train_images(
    subject: Subject,
    *,
    interpolation: Interpolation,
    batch_size: int,
    steps: int,
    first_step: int,
    seed: int,
    num_workers: int,
    drawn: Drawn,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented batches of the train set; what they hold depends on seed and step alone.

    Args:
        subject: whose images these are.
        interpolation: of the crops.
        batch_size: images of a step.
        steps: number of batches, those before the first one included.
        first_step: begin with the batch of this step.
        seed: of order and crops.
        num_workers: processes that decode.
        drawn: is told what the batches hold.

    Returns:
        Images (N, C, H, H) float32, cropped at random, mirrored or not, normalised; labels (N,)
        int64; both on the device.
    """
    card = subject.card
    batches = labelled_crops(
        subject.train,
        size=card.crop,
        interpolation=interpolation,
        batch_size=batch_size,
        steps=steps,
        first_step=first_step,
        seed=seed,
        num_workers=num_workers,
        pin_memory=subject.device.type == "cuda",
    )
    for batch in batches:
        drawn.read[batch.ids] = True
        drawn.unreadable[batch.unreadable] = True
        crops = to_device(batch.crops, subject.device)
        images = finish_crops(crops, batch.params, mean=card.mean, std=card.std, compiled=False)
        yield images, to_device(batch.labels, subject.device)
