"""What all classifiers need: a backbone, two labelled sets of the same classes, and a count.

Shape letters: N images, C classes (channels in images), H rows and columns of a crop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinoscale.convert.weights_file import BackboneCard, load_backbone
from dinoscale.data.augment import Interpolation
from dinoscale.data.colors import finish_crops
from dinoscale.data.decode import Decoder
from dinoscale.data.labelled_crops import labelled_crops
from dinoscale.data.sources import Source, open_source
from dinoscale.data.transfer import to_device
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.features import extract_features, find_device
from dinoscale.evaluate.knn import renumber_classes
from dinoscale.models.zoo import build_backbone

TOP = 5  # classes that may be right for the top-5 accuracy
UNTRAINED_SEED = 0  # of the fresh weights that a trained network is compared with
CLASSES_SHOWN = 5  # in an error


@dataclass(frozen=True)
class Reading:
    """How images are read and forwarded; none of it changes a number.

    Attributes:
        batch_size: images of one forward without gradients.
        num_workers: processes that decode images; 0 decodes in this one.
        progress: draw bars on stderr, if that is a terminal.
    """

    batch_size: int = 64
    num_workers: int = 4
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


def open_subject(
    weights_path: str | Path,
    train_spec: str,
    test_spec: str,
    *,
    device: str | None,
    num_heads: int | None,
) -> Subject:
    """Load weights and open both sets.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        train_spec: as `data.train` of a config; a subfolder a class, or shards with class numbers.
        test_spec: likewise; its classes must be those of the train set.
        device: a torch device; None takes the accelerator if there is one.
        num_heads: for reference checkpoints whose attention heads are not 64 channels wide.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: there is no such device.
        DataError: a set cannot be read or lacks labels, the classes differ, or there is only one.
    """
    where = find_device(device)
    backbone, card = load_backbone(weights_path, num_heads=num_heads)
    decoder = Decoder(card.backbone.in_chans, card.white)
    train, test = open_source(train_spec, decoder), open_source(test_spec, decoder)
    renumber = renumber_classes(train, test)
    assert train.labels is not None
    assert test.labels is not None
    known = np.unique(train.labels)
    if len(known) < 2:
        raise DataError(
            f"{train_spec}: all {len(train)} images are of one class; a classifier needs two"
        )
    unknown = np.setdiff1d(renumber.numpy()[np.unique(test.labels)], known).tolist()
    if unknown:
        raise DataError(
            f"{test_spec}: has classes that {train_spec} has no images of: number "
            + ", ".join(map(str, unknown[:CLASSES_SHOWN]))
        )
    return Subject(
        weights=str(weights_path),
        backbone=backbone.to(where),
        card=card,
        device=where,
        train=train,
        test=test,
        specs=(train_spec, test_spec),
        num_classes=int(known.max()) + 1,
        renumber=renumber,
    )


def untrained_backbone(subject: Subject) -> nn.Module:
    """The same architecture with fresh weights, always the same, in eval mode on the device."""
    with torch.random.fork_rng():
        torch.manual_seed(UNTRAINED_SEED)
        fresh = build_backbone(**asdict(subject.card.backbone))
    return fresh.to(subject.device).eval().requires_grad_(False)


def outputs_of_train(
    network: nn.Module, subject: Subject, reading: Reading
) -> tuple[Tensor, Tensor]:
    """What the network makes of the train set without augmentation; as `outputs_of_test`."""
    return _outputs(network, subject, subject.train, reading, spec=subject.specs[0])


def outputs_of_test(
    network: nn.Module, subject: Subject, reading: Reading
) -> tuple[Tensor, Tensor]:
    """What the network makes of the test set.

    Returns:
        Outputs (N, D) float32, and labels (N,) int64 in the train set's numbers, on the device.

    Raises:
        DataError: none of the images can be read.
        NonFiniteError: an output is not a finite number.
    """
    outputs, labels = _outputs(network, subject, subject.test, reading, spec=subject.specs[1])
    return outputs, subject.renumber.to(labels.device)[labels]


def _outputs(
    network: nn.Module, subject: Subject, source: Source, reading: Reading, *, spec: str
) -> tuple[Tensor, Tensor]:
    card = subject.card
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
        progress=reading.progress,
    )
    if not len(outputs):
        raise DataError(f"{spec}: none of the images can be read")
    return outputs, labels


def train_images(
    subject: Subject,
    *,
    interpolation: Interpolation,
    batch_size: int,
    steps: int,
    seed: int,
    num_workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented batches of the train set; what they hold depends on the seed alone.

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
        seed=seed,
        num_workers=num_workers,
        pin_memory=subject.device.type == "cuda",
    )
    for batch in batches:
        crops = to_device(batch.crops, subject.device)
        images = finish_crops(crops, batch.params, mean=card.mean, std=card.std)
        yield images, to_device(batch.labels, subject.device)


def num_right(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Count images whose class has the highest score, and one of the five highest.

    Args:
        logits: scores of each class, (N, C), or (N, G, C) of G classifiers.
        labels: (N,) int64.

    Returns:
        Two int64 counts, each () or (G,).
    """
    best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
    hits = best == labels.view(-1, *[1] * (logits.ndim - 1))
    return hits[..., 0].sum(dim=0), hits.any(dim=-1).sum(dim=0)


def percent(top1: int, top5: int, *, images: int, num_classes: int) -> dict[str, float]:
    """Accuracies in percent; the five best of five classes or fewer say nothing."""
    score = {"top1": 100 * top1 / images}
    return score | ({"top5": 100 * top5 / images} if num_classes > TOP else {})


def choose_best(entries: Sequence[Mapping[str, Any]], *, with_last: bool) -> dict[str, object]:
    """Report the entry with the highest top-1 accuracy on the test set, the first of equals.

    Args:
        entries: measurements with `top1` and maybe `top5`, in order.
        with_last: the score also has the accuracies of the last entry, which nobody chose.

    Returns:
        `score`, and `chosen`: the entry, with the set that it was chosen on.
    """
    best, last = max(entries, key=lambda entry: entry["top1"]), entries[-1]
    names = [name for name in ("top1", "top5") if name in best]
    score = {name: best[name] for name in names}
    if with_last:
        score |= {f"last_{name}": last[name] for name in names}
    return {"score": score, "chosen": {**best, "chosen_on": "test"}}


def describe(task: str, subject: Subject) -> dict[str, object]:
    """The head of a task's report."""
    names = ("train", "test")
    sets = zip(names, subject.specs, (subject.train, subject.test), strict=True)
    return {
        "task": task,
        "weights": subject.weights,
        "weights_source": subject.card.source,
        "backbone": asdict(subject.card.backbone),
        "classes": subject.num_classes,
        **{name: {"spec": spec, "images": len(source)} for name, spec, source in sets},
    }


def preprocessing(card: BackboneCard) -> dict[str, object]:
    """How test images are prepared: bicubic resize of the short side, center crop, normalise."""
    return {
        "resize": card.resize,
        "crop": card.crop,
        "interpolation": "bicubic",
        "mean": list(card.mean),
        "std": list(card.std),
    }


class ResultLog:
    """What is known so far, line by line: a task that is cut off has not measured in vain.

    Args:
        path: of a JSON-lines file to append to; None keeps nothing.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: str | Path | None):
        self._path = None if path is None else Path(path)
        self._append("")

    def add(self, record: Mapping[str, object]) -> None:
        """Append a line.

        Raises:
            ConfigError: the file cannot be written.
        """
        self._append(json.dumps(record) + "\n")

    def _append(self, text: str) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise ConfigError(f"log: {self._path} cannot be written ({error.strerror})") from error
