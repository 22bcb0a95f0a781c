"""Trained classifiers kept in files, and their accuracy on other test sets.

The file holds `weight` (C, K) and `bias` (C,), and a card: of which features of which backbone they
are, and what the classes are called.

Shape letters: N images that can be read, C classes, K width of the classifier's input, L labels of
an image at most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from dinoscale.data.sources.classes import Classes, classes_of, same_classes
from dinoscale.data.sources.source import Source
from dinoscale.errors import CheckpointError, DataError
from dinoscale.evaluate.classification.accuracy import answers, num_correct, percent
from dinoscale.evaluate.classification.answers import NO_DETAILS, Answers, Details, intervals
from dinoscale.evaluate.classification.labelled_sets import describe_set
from dinoscale.evaluate.classification.linear_heads import FeatureKind, TokenFeatures
from dinoscale.evaluate.features import check_labels
from dinoscale.evaluate.frozen_backbone import (
    DEFAULT_EXTRACTION,
    OUTPUT,
    ExtractionOptions,
    FeatureExtractor,
    load_extractor,
)
from dinoscale.evaluate.label_lists import LabelLists, read_label_lists, with_a_class
from dinoscale.runtime import distributed
from dinoscale.runtime.opening import on_first_rank, open_once_per_node

CARD_KEY = "probe"  # of the metadata of the file
_AT_ONCE = 2**12  # images whose scores are held; 32 MiB of float64 for 1000 classes


@dataclass(frozen=True)
class ProbeCard:
    """What a kept classifier is made for.

    Attributes:
        task: that trained it.
        backbone: `identity` of the one that its features are of; in files of older versions a
            digest of its weights.
        tokens: which it takes; None takes the backbone's output.
        normalised: features have length 1.
        precision: of the backbone.
        resize: short side of an image before the crop, in pixels.
        crop: side of the center crop, in pixels.
        classes: of the train set.
        measured: what the training said of it.
        training: digest of the train set, not of what its images show, and the settings; empty in
            files of older versions.
    """

    task: str
    backbone: object
    tokens: FeatureKind | None
    normalised: bool
    precision: Literal["bf16", "fp32"]
    resize: int
    crop: int
    classes: Classes
    measured: Mapping[str, object]
    training: Mapping[str, object]

    @classmethod
    def of(
        cls,
        task: str,
        extractor: FeatureExtractor,
        backbone: torch.nn.Module,
        train: Source,
        *,
        measured: Mapping[str, object],
        training: Mapping[str, object],
        tokens: FeatureKind | None = None,
        normalised: bool = False,
        precision: Literal["bf16", "fp32"] = "fp32",
    ) -> ProbeCard:
        """Describe a classifier of a backbone on features that an extractor prepares."""
        return cls(
            task=task,
            backbone=extractor.identity(backbone),
            tokens=tokens,
            normalised=normalised,
            precision=precision,
            resize=extractor.card.resize,
            crop=extractor.card.crop,
            classes=classes_of(train, check_labels(train, name="train")),
            measured=measured,
            training=training,
        )

    def metadata(self) -> dict[str, str]:
        """For the file, which `load_probe` reads; of several keys the order would be random."""
        return {CARD_KEY: json.dumps(asdict(self))}

    @classmethod
    def parse(cls, text: str) -> ProbeCard:
        """Read what `metadata` wrote; KeyError, TypeError or ValueError if it is no such text."""
        card: dict[str, Any] = json.loads(text)
        tokens, classes = card["tokens"], card["classes"]
        return cls(
            task=str(card["task"]),
            backbone=card["backbone"],
            tokens=None if tokens is None else FeatureKind(**tokens),
            normalised=bool(card["normalised"]),
            precision="bf16" if card["precision"] == "bf16" else "fp32",
            resize=int(card["resize"]),
            crop=int(card["crop"]),
            classes=Classes(
                [int(number) for number in classes["present"]],
                {int(number): tuple(names) for number, names in classes["names"].items()},
                {int(number): int(outside) for number, outside in classes["numbers"].items()},
            ),
            measured=dict(card["measured"]),
            training=dict(card.get("training", {})),
        )


@dataclass(frozen=True, eq=False)
class KeptProbe:
    """A classifier from a file."""

    card: ProbeCard
    weight: Tensor  # (C, K)
    bias: Tensor  # (C,)

    def rows(self, extractor: FeatureExtractor, source: Source) -> tuple[Tensor, Tensor]:
        """Input (N, K) for the images that can be read, and their numbers (N,); collective."""
        card, tokens = self.card, self.card.tokens
        network = (
            None if tokens is None else TokenFeatures(extractor.backbone, blocks=tokens.blocks)
        )
        key = OUTPUT if network is None else network.output_key
        key += "" if card.precision == "fp32" else f" in {card.precision}"
        fast = card.precision == "bf16"
        with torch.autocast(extractor.device.type, dtype=torch.bfloat16, enabled=fast):
            features, numbers = extractor.unlabelled(source, network, output_key=key)
        if tokens is not None:
            width = int(extractor.backbone.embed_dim)  # type: ignore[arg-type]  # an int
            features = tokens.take(features, stored=tokens.blocks, token_dim=width)
        rows = features.to(self.weight.dtype)
        return F.normalize(rows, dim=1) if card.normalised else rows, numbers

    def judge(self, rows: Tensor, labels: Tensor, competing: list[int]) -> _Judgement:
        """Classify rows (N, K) of known labels (N,) or (N, L) among some classes, and among all."""
        weight, bias = self.weight.to(rows.device), self.bias.to(rows.device)
        found, counts = [], [0, 0, 0]
        for some, truth in zip(rows.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
            logits = F.linear(some, weight, bias)  # (some, C)
            among = torch.full_like(logits, -torch.inf)
            among[:, competing] = logits[:, competing]
            of_all = num_correct(logits, truth)[0]
            new = (*num_correct(among, truth), of_all)
            counts = [count + int(more) for count, more in zip(counts, new, strict=True)]
            found.append(answers(among))
        return _Judgement(torch.cat(found), *counts)


@dataclass(frozen=True, eq=False)
class _Judgement:
    """Answers (N,) among the classes that compete, and how many are right."""

    answers: Tensor
    top1: int
    top5: int
    top1_of_all: int  # where all classes compete


def load_probe(path: str | Path) -> KeptProbe:
    """Read the file of a kept classifier.

    Raises:
        CheckpointError: it is missing, damaged, or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            card = ProbeCard.parse((file.metadata() or {})[CARD_KEY])
            probe = KeptProbe(card, file.get_tensor("weight"), file.get_tensor("bias"))
    except (
        *(OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError),
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"{path} is no kept classifier: name a file that `evaluate linear`, `logistic` or"
            " `finetune` wrote with --out"
        ) from error
    is_matrix = probe.weight.ndim == 2 and probe.bias.shape == probe.weight.shape[:1]
    if not is_matrix or not set(card.classes.present) <= set(range(len(probe.bias))):
        shapes = f"{[*probe.weight.shape]} and {[*probe.bias.shape]}"
        raise CheckpointError(
            f"{path}: weight and bias of shapes {shapes} are no classifier of its classes"
        )
    return probe


def evaluate_probe(
    weights_path: str | Path,
    probe_path: str | Path,
    test_spec: str,
    *,
    labels_path: str | Path | None = None,
    details: Details = NO_DETAILS,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Judge a kept classifier by another test set; all ranks of a job call it.

    The classes of the set must be among those that it was trained on. Where they are fewer, the
    others do not compete, as ImageNet-R and -A are measured; `top1_all_classes` lets them. With
    labels from a file all compete, as in k-NN and in Beyer et al. 2020: which classes the file
    names would tell of its answers.

    Args:
        weights_path: the backbone that the classifier was trained on.
        probe_path: file of the classifier.
        test_spec: labelled images, as `data.train` of a config.
        labels_path: file with several right classes for each image, see `label_lists`; no top-5
            then. None takes the class of each image.
        details: what to say of the answers for single images.
        options: which network, which device, and how images are read; sizes that are not given are
            those of the training.

    Raises:
        CheckpointError: the weights or the classifier cannot be used, or not together.
        ConfigError: a setting is out of range.
        DataError: the set cannot be read, lacks labels, or has other classes.
    """
    details.check()
    probe = distributed.together(partial(load_probe, probe_path))
    card = probe.card
    resize, crop = options.resize or card.resize, options.crop or card.crop
    extractor = load_extractor(weights_path, replace(options, resize=resize, crop=crop))
    distributed.together(partial(_require_backbone, extractor, probe, probe_path))
    source = open_once_per_node(partial(extractor.open, test_spec))
    first = on_first_rank(lambda _: _truth(card.classes, source, test_spec, labels_path))
    truth = distributed.broadcast_object(first)
    assert truth is not None
    rows, numbers = probe.rows(extractor, source)
    if not len(rows):
        raise DataError(f"{test_spec}: none of the images can be read")
    unreadable = len(source) - len(rows)
    rows, numbers, labels = truth.counted(rows, numbers)
    found = probe.judge(rows, labels, truth.competing)
    given = Answers(
        *(source, lambda: card.classes, numbers.cpu(), labels.cpu(), found.answers.cpu())
    )
    score = _score(found, truth, images=len(rows), trained=len(card.classes.present))
    return extractor.report(
        "probe",
        probe=str(probe_path),
        test=describe_set(test_spec, source, labels, unreadable=unreadable, lists=truth.lists),
        protocol=_protocol(extractor, card, competing=len(truth.competing)),
        score=score,
        intervals=intervals(score, images=len(labels)),
        **given.report(details),
    )


def _require_backbone(extractor: FeatureExtractor, probe: KeptProbe, path: str | Path) -> None:
    extractor.require_identity(probe.card.backbone, path)
    tokens = probe.card.tokens
    width = int(extractor.backbone.embed_dim)  # type: ignore[arg-type]  # an int
    width *= 1 if tokens is None else tokens.blocks + tokens.pooled
    if width != probe.weight.shape[1]:
        raise CheckpointError(
            f"{path} is damaged: it takes {probe.weight.shape[1]} channels, features have {width}"
        )


@dataclass(frozen=True, eq=False)
class _Truth:
    """The right classes of the images of a set, in the numbers of the classifier.

    Attributes:
        competing: the classes that it is asked to choose from.
        labels: (N,) int64 of all images of the set, or (N, L) of lists.
        lists: where they are from a file.
    """

    competing: list[int]
    labels: Tensor
    lists: LabelLists | None = None

    def counted(self, rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, numbers and labels of the images with a label, of rows (n, K) and numbers (n,)."""
        labels = self.labels.to(numbers.device)[numbers]
        if self.lists is None:
            return rows, numbers, labels
        counted = with_a_class(labels)
        return rows[counted], numbers[counted], labels[counted]


def _truth(classes: Classes, test: Source, spec: str, labels_path: str | Path | None) -> _Truth:
    if labels_path is not None:
        lists = read_label_lists(labels_path, test, spec, classes)
        return _Truth(classes.present, lists.rows, lists)
    labels = check_labels(test, name="test")
    same = same_classes(classes, classes_of(test, labels))
    renumbered = torch.tensor([same.get(i, -1) for i in range(max(same) + 1)])
    return _Truth([*same.values()], renumbered[torch.from_numpy(labels)])


def _score(found: _Judgement, truth: _Truth, *, images: int, trained: int) -> dict[str, float]:
    """Top-1 and top-5 among the classes of the set; and top-1 among all, if these are more."""
    competing = len(truth.competing)
    score = percent(found.top1, found.top5, images=images, num_classes=competing)
    if truth.lists is not None:
        score.pop("top5", None)  # Beyer et al. report none
    if competing == trained:
        return score
    return score | {"top1_all_classes": 100 * found.top1_of_all / images}


def _protocol(extractor: FeatureExtractor, card: ProbeCard, *, competing: int) -> dict[str, object]:
    taken = "backbone output (of a ViT: normalised CLS token)"
    about: Mapping[str, object] = {} if card.tokens is None else asdict(card.tokens)
    return {
        "network": extractor.options.network,
        "trained_by": card.task,
        "training": dict(card.training),
        "features": about or taken,
        "normalised": card.normalised,
        "precision": card.precision,
        "competing_classes": competing,
        "images": extractor.preparation,
    }
