"""Copy detection: find the original of an edited picture among others.

`evaluate_copies` takes originals and their copies (Copydays), `evaluate_made_copies` makes copies
of any set of images.

Shape letters: N images of the database, Q queries, E width of a descriptor.
Source: Caron et al. 2021 (arXiv:2104.14294), section 4.2.1, and its published evaluation code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.mixture import left_out_counts
from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.any_size import image_mode
from dinoscale.evaluate.classification.knn import TEST_CHUNK, nearest_neighbours
from dinoscale.evaluate.frozen_backbone import (
    DEFAULT_EXTRACTION,
    ExtractionOptions,
    FeatureExtractor,
    load_extractor,
)
from dinoscale.evaluate.overlap import equal_pictures
from dinoscale.evaluate.retrieval.copy_descriptors import (
    GEM_POWER,
    CopyDescriptor,
    Whitening,
    learn_whitening,
    unit,
)
from dinoscale.evaluate.retrieval.copy_images import EDITS, Squares
from dinoscale.evaluate.retrieval.copy_pairs import pairs_of_csv, pairs_of_names, pairs_of_prefix
from dinoscale.evaluate.retrieval.multi_scale import least_side
from dinoscale.evaluate.retrieval.ranking import random_precision, trapezoid_precision
from dinoscale.runtime.fingerprint import digest_of

log = logging.getLogger(__name__)

SIZE = 320  # pixels, of the published numbers with patches of 8 (224 for ViT-B/16)
DEPTH = 20  # ranks that count
HEADLINE = "strong"  # the block that is reported
MADE_QUERIES = 157  # number of originals in Copydays

Scores = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """What is measured, and by which descriptors; the defaults are the published ones.

    Attributes:
        size: side of the squares, pixels.
        whitening: images that a whitening is learned from; None does not whiten.
        untrained: also measure the same architecture with fresh weights.
    """

    size: int = SIZE
    whitening: str | None = None
    untrained: bool = False

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ConfigError: one is.
        """
        if self.size < 1:
            raise ConfigError(f"size: need a number of pixels above 0, got {self.size}")


@dataclass(frozen=True)
class _Block:
    """Queries of one kind, and the numbers of the originals of each."""

    name: str
    queries: Squares
    positives: Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class _Part:
    """Some pictures of a set."""

    source: Source
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)


def evaluate_copies(
    weights_path: str | Path,
    originals: str,
    queries: str,
    *,
    distractors: str | None = None,
    pairs: str | None = None,
    prefix: int | None = None,
    settings: Settings | None = None,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Find the originals of copies among other images, by the protocol of Copydays.

    Args:
        weights_path: of a ViT.
        originals: folder of the originals.
        queries: folder of the copies; every folder below it that holds images is a block.
        distractors: other images of the database, as `data.train` of a config; unreadable images
            are left out, and so are originals and queries among them.
        pairs: CSV of queries and their originals; see `copy_pairs`.
        prefix: number of first characters that the file names share (Copydays: 4).
        settings: of the measurement; None takes the published ones, without whitening.
        options: which network, which device, and how images are read.

    Returns:
        What was measured and how, ready for JSON. `score` holds the mAP in percent of the block
        `strong`, else the mean over the blocks, and then that of every block.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no patch tokens.
        DataError: an original or a query cannot be read, or a query has no known original.
    """
    if pairs is not None and prefix is not None:
        raise ConfigError("give --pairs or --prefix, not both")
    detection = _CopyDetection(weights_path, settings, options)
    database, copies = (
        FolderSource(path, decoder=detection.decoder) for path in (originals, queries)
    )
    known, names = _relative(database, originals), _relative(copies, queries)
    positives, rule = _pairs(names, known, pairs=pairs, prefix=prefix)
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(os.path.dirname(name) or "queries", []).append(i)
    blocks = [
        _Block(name, detection.squares(copies, numbers), [positives[i] for i in numbers])
        for name, numbers in sorted(members.items())
    ]
    others = None if distractors is None else detection.open(distractors)
    sets = {"originals": database, "queries": copies, "distractors": others}
    left_out = {
        name: None if source is None else left_out_counts(source) for name, source in sets.items()
    }
    specs = {"originals": originals, "queries": queries, "distractors": distractors}
    data: dict[str, object] = {**specs, "pairs": rule, "left_out": left_out}
    return detection.report(database, others, blocks, data=data)


def _pairs(
    queries: Sequence[str], originals: Sequence[str], *, pairs: str | None, prefix: int | None
) -> tuple[list[tuple[int, ...]], str]:
    """Numbers of the originals of every query, and by which rule."""
    if pairs is not None:
        return pairs_of_csv(pairs, queries, originals), f"lines of {pairs}"
    if prefix is not None:
        rule = f"equal first {prefix} characters"
        return pairs_of_prefix(prefix, queries, originals), rule
    rule = "longest name before a separator in the query's"
    return pairs_of_names(queries, originals), rule


def _relative(source: FolderSource, folder: str) -> list[str]:
    """Paths of the images below the folder."""
    root = os.path.abspath(folder)
    return [os.path.relpath(source.path(i), root) for i in range(len(source))]


def evaluate_made_copies(
    weights_path: str | Path,
    spec: str,
    *,
    queries: int = MADE_QUERIES,
    seed: int = 0,
    settings: Settings | None = None,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Make copies of some images of a set, and find their originals among all of its images.

    Each edit of `copy_images` makes one copy of every query image, and is a block.

    Args:
        weights_path: of a ViT.
        spec: the images, as `data.train` of a config; labels are not needed.
        queries: how many images are copied, chosen at random by the seed.
        seed: of the choice and of the edits.
        settings: of the measurement; None takes the published ones, without whitening.
        options: which network, which device, and how images are read.

    Returns:
        As `evaluate_copies`.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no patch tokens.
        DataError: one of the images that are copied cannot be read.
    """
    if queries < 1 or seed < 0:
        raise ConfigError(f"need queries > 0 and seed >= 0, got {queries} and {seed}")
    detection = _CopyDetection(weights_path, settings, options)
    image_mode(channels=detection.card.backbone.in_chans)
    source = detection.open(spec)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(source))[:queries]).tolist()
    positives = [(number,) for number in chosen]
    blocks = [
        _Block(edit, detection.squares(source, chosen, edit=edit, seed=seed), positives)
        for edit in EDITS
    ]
    data: dict[str, object] = {"spec": spec, "seed": seed, "pairs": "made here"}
    data["left_out"] = left_out_counts(source)
    return detection.report(source, None, blocks, data=data)


class _CopyDetection:
    """A backbone and the settings of one measurement."""

    def __init__(
        self, weights_path: str | Path, settings: Settings | None, options: ExtractionOptions
    ) -> None:
        self._settings = settings or Settings()
        self._settings.check()
        size = self._settings.size
        sizes = replace(options, resize=size, crop=size)
        self._extractor = load_extractor(weights_path, sizes)
        if size < least_side(self._extractor.backbone):
            raise ConfigError(f"size: {size} pixels are less than a patch")
        self.card, self.decoder = self._extractor.card, self._extractor.decoder
        self.open = self._extractor.open

    def squares(
        self, source: Source, numbers: Sequence[int], *, edit: str = "", seed: int = 0
    ) -> Squares:
        """Some images of a source at the size of the settings."""
        return Squares(source, self._settings.size, numbers, edit, seed)

    def report(
        self,
        originals: Source,
        distractors: Source | None,
        blocks: Sequence[_Block],
        *,
        data: Mapping[str, object],
    ) -> dict[str, object]:
        """Measure, and report what was measured and how."""
        database, blocks = _each_once(originals, distractors, blocks)
        left_out = sum(len(part.source) - len(part) for part in database)
        if left_out:
            log.warning(
                "%d pictures of the database are left out: they are, byte for byte, a query or the"
                " original of one",
                left_out,
            )
        score, size = self._measure(self._extractor, database, blocks)
        baseline = {block.name: _random(block, images=size) for block in blocks}
        report = self._extractor.report(
            "copies",
            data={
                **data,
                "database": size,
                "same_as_asked_for": left_out,
                "queries": {block.name: len(block.queries) for block in blocks},
            },
            protocol=self._protocol(),
            score=_headline(score),
            floors=_headline(baseline),
        )
        if self._settings.untrained:
            fresh = self._extractor.untrained()
            report["untrained"] = _headline(self._measure(fresh, database, blocks)[0])
        return report

    def _measure(
        self, extractor: FeatureExtractor, database: Sequence[_Part], blocks: Sequence[_Block]
    ) -> tuple[Scores, int]:
        """Percent of every block, and the number of images in the database."""
        extract = partial(_described, extractor, CopyDescriptor(extractor.backbone))
        described = [extract(self.squares(part.source, part.numbers)) for part in database]
        bank = torch.cat([descriptors for descriptors, _ in described])
        numbers = database[0].numbers
        row_of = {numbers[place]: row for row, place in enumerate(described[0][1].tolist())}
        whitening = self._whitening(extract)
        bank = unit(bank, whitening)
        scores = {}
        for block in blocks:
            descriptors, places = extract(block.queries)
            _check_readable(block, places, row_of, database[0].source)
            positives = [[row_of[number] for number in numbers] for numbers in block.positives]
            scores[block.name] = score_copies(unit(descriptors, whitening), bank, positives)
        return scores, len(bank)

    def _whitening(self, extract: Callable[[Squares], tuple[Tensor, Tensor]]) -> Whitening | None:
        spec = self._settings.whitening
        if spec is None:
            return None
        source = self.open(spec)
        descriptors, _ = extract(self.squares(source, range(len(source))))
        if not len(descriptors):
            raise DataError(f"{spec}: none of the images can be read")
        return learn_whitening(descriptors)

    def _protocol(self) -> dict[str, object]:
        return {
            "method": "cosine similarity of whitened descriptors; only the first ranks count",
            "features": "normalised CLS token and generalised mean of the patch tokens",
            "network": self._extractor.options.network,
            "gem_power": GEM_POWER,
            "size": self._settings.size,
            "interpolation": "bicubic, to a square",
            "whitening": self._settings.whitening,
            "depth": DEPTH,
            "average_precision": "trapezoids",
            **self._extractor.normalisation,
            "headline": f"block {HEADLINE} if there is one, else the mean over the blocks",
            "floor": "expectation of a random order",
        }


def _described(
    extractor: FeatureExtractor, network: nn.Module, squares: Squares
) -> tuple[Tensor, Tensor]:
    """Descriptors (N, E) of the readable squares, and their positions (N,)."""
    extract = partial(extractor.features, squares, network, output_key=None)
    edit = f"edit {squares.edit}, seed {squares.seed}" if squares.edit else "as they are"
    taken = f"descriptors of squares, {edit}, images {digest_of([*squares.numbers])}"
    return extractor.cached(
        squares.source, extract, taken=taken, images=len(squares), module=__name__
    )


def _each_once(
    originals: Source, distractors: Source | None, blocks: Sequence[_Block]
) -> tuple[list[_Part], list[_Block]]:
    """The database with each wanted original once and without queries; the blocks to match.

    A duplicate of an original would be equally similar, and count as a mistake.
    """
    wanted = sorted({i for block in blocks for numbers in block.positives for i in numbers})
    first = {i: min(same) for i, same in equal_pictures(originals, wanted, originals).items()}
    blocks = [
        replace(
            block, positives=[tuple(sorted({first.get(i, i) for i in x})) for x in block.positives]
        )
        for block in blocks
    ]
    database = [_Part(originals, [i for i in range(len(originals)) if first.get(i, i) == i])]
    if distractors is not None:
        copies = blocks[0].queries.source
        same = {*equal_pictures(originals, wanted, distractors)}
        same |= {*equal_pictures(copies, range(len(copies)), distractors)}
        others = [i for i in range(len(distractors)) if i not in same]
        database.append(_Part(distractors, others))
    return database, blocks


def _check_readable(
    block: _Block, places: Tensor, row_of: Mapping[int, int], originals: Source
) -> None:
    """Refuse to measure if a query or the original of one is unreadable."""
    unread = sorted(set(range(len(block.queries))) - set(places.tolist()))
    wanted = {number for numbers in block.positives for number in numbers}
    lost = sorted(wanted - row_of.keys())
    paths = [block.queries.path(i) for i in unread] + [originals.path(number) for number in lost]
    if paths:
        raise DataError(
            f"{len(paths)} originals or queries of the block {block.name} cannot be read, the "
            f"first is {paths[0]}. Repair them, or leave out both."
        )


def score_copies(queries: Tensor, bank: Tensor, positives: Sequence[Sequence[int]]) -> float:
    """Mean average precision (trapezoids) of the first 20 ranks, in percent.

    Of equally similar images the first in the bank counts as nearer. At most `TEST_CHUNK` x
    `BANK_CHUNK` cosines of `knn` are in memory at a time.

    Args:
        queries: (Q, E), of norm 1.
        bank: (N, E), of norm 1.
        positives: numbers of images of the bank for each query, at least one each.
    """
    chunks = queries.split(TEST_CHUNK)
    k = min(DEPTH, len(bank))
    nearest = torch.cat([nearest_neighbours(bank, chunk, k=k)[1] for chunk in chunks]).cpu().numpy()
    hits = np.stack(
        [np.isin(ranks, wanted) for ranks, wanted in zip(nearest, positives, strict=True)]
    )
    counts = torch.tensor([len(wanted) for wanted in positives])
    return 100 * float(trapezoid_precision(torch.from_numpy(hits), counts).mean())


def _random(block: _Block, *, images: int) -> float:
    """Expected score of a random order, in percent."""
    found = [
        random_precision(images=images, positives=len(wanted), depth=DEPTH, trapezoids=True)
        for wanted in block.positives
    ]
    return 100 * float(np.mean(found))


def _headline(blocks: Scores) -> Scores:
    """The headline, then the numbers of the blocks."""
    first = blocks.get(HEADLINE, float(np.mean(list(blocks.values()))))
    return {"mAP": first, **{f"mAP {name}": value for name, value in blocks.items()}}
