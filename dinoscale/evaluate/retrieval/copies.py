"""Copy detection: find the original of an edited picture among others.

`evaluate_copies` takes originals and their copies (Copydays), `evaluate_made_copies` makes copies
of any set of images.

Shape letters: N images of the database, Q queries, E width of a descriptor.
Source: Caron et al. 2021 (arXiv:2104.14294), section 4.2.1, and its published evaluation code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dinoscale.convert.weights import Network
from dinoscale.convert.weights_file import load_backbone
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.mixture import left_out_counts
from dinoscale.data.sources.source import Source, open_source
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.classification.knn import TEST_CHUNK, nearest_neighbours
from dinoscale.evaluate.features import extract_features, find_device
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
from dinoscale.evaluate.untrained import untrained_backbone

log = logging.getLogger(__name__)

SIZE = 320  # pixels, of the published numbers of patches of 8 (224 for ViT-B/16)
DEPTH = 20  # ranks that count
HEADLINE = "strong"  # the block that is reported
MADE_QUERIES = 157  # as many as Copydays has originals

Scores = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """How descriptors are made."""

    size: int = SIZE  # side of the squares, pixels
    whitening: str | None = None  # images that it is learned from; None does without
    batch_size: int = 64  # images in one forward
    num_workers: int = 2  # processes that decode
    device: str | None = None  # of torch; None takes the accelerator if there is one
    network: Network = "teacher"  # of a run or a full checkpoint
    num_heads: int | None = None  # for weights that do not tell
    untrained: bool = False  # also measure the same architecture with fresh weights
    progress: bool = True  # draw bars on stderr, if that is a terminal


@dataclass(frozen=True)
class _Block:
    """Queries of one kind, and the numbers in the database that are right for each."""

    name: str
    queries: Squares
    right: Sequence[tuple[int, ...]]


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
) -> dict[str, object]:
    """Find the originals of copies among them and other images, by the protocol of Copydays.

    Args:
        weights_path: of a ViT.
        originals: folder of the originals.
        queries: folder of the copies; every folder below it that holds images is a block.
        distractors: other images of the database, as `data.train` of a config; unreadable ones are
            left out, and so are originals and queries among them.
        pairs: CSV of which belongs to which; see `copy_pairs`.
        prefix: so many first characters of the file names are equal (Copydays: 4).
        settings: of the descriptors; None takes the published ones, without whitening.

    Returns:
        What was measured and how, ready for JSON. `score` holds the mAP in percent of the block
        `strong`, or else the mean over the blocks, and of every block.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no patch tokens.
        DataError: an original or a query cannot be read, or it is not known what belongs together.
    """
    if pairs is not None and prefix is not None:
        raise ConfigError("give --pairs or --prefix, not both")
    run = _Run(weights_path, settings or Settings())
    wanted, asked = (FolderSource(path, decoder=run.decoder) for path in (originals, queries))
    known, names = _relative(wanted, originals), _relative(asked, queries)
    if pairs is not None:
        right, rule = pairs_of_csv(pairs, names, known), f"lines of {pairs}"
    elif prefix is not None:
        right, rule = pairs_of_prefix(prefix, names, known), f"equal first {prefix} characters"
    else:
        right, rule = pairs_of_names(names, known), "longest name before a separator in the query's"
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(os.path.dirname(name) or "queries", []).append(i)
    blocks = [
        _Block(name, run.squares(asked, numbers), [right[i] for i in numbers])
        for name, numbers in sorted(members.items())
    ]
    others = None if distractors is None else open_source(distractors, run.decoder)
    data: dict[str, object] = {
        "originals": originals,
        "queries": queries,
        "distractors": distractors,
        "pairs": rule,
        "left_out": {
            "originals": left_out_counts(wanted),
            "queries": left_out_counts(asked),
            "distractors": None if others is None else left_out_counts(others),
        },
    }
    return run.report(wanted, others, blocks, data=data)


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
) -> dict[str, object]:
    """Make copies of some images of a set, and find the images again among all of the set.

    Every query image gives one copy for each of the edits of `copy_images`, each a block.

    Args:
        weights_path: of a ViT.
        spec: the images, as `data.train` of a config; labels are not needed.
        queries: how many images are copied, drawn at random and always the same for a seed.
        seed: of the choice and of the edits.
        settings: of the descriptors; None takes the published ones, without whitening.

    Returns:
        As `evaluate_copies`.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range, or the backbone has no patch tokens.
        DataError: one of the images that are copied cannot be read.
    """
    if queries < 1 or seed < 0:
        raise ConfigError(f"need queries > 0 and seed >= 0, got {queries} and {seed}")
    run = _Run(weights_path, settings or Settings())
    if run.card.backbone.in_chans not in (1, 3):
        raise ConfigError(f"copies are made of 1 or 3 channels, not {run.card.backbone.in_chans}")
    source = open_source(spec, run.decoder)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(source))[:queries]).tolist()
    right = [(number,) for number in chosen]
    blocks = [
        _Block(edit, run.squares(source, chosen, edit=edit, seed=seed), right) for edit in EDITS
    ]
    data: dict[str, object] = {"spec": spec, "seed": seed, "pairs": "made here"}
    return run.report(source, None, blocks, data={**data, "left_out": left_out_counts(source)})


class _Run:
    """A backbone and the settings of one measurement."""

    def __init__(self, weights_path: str | Path, settings: Settings) -> None:
        if min(settings.size, settings.batch_size) < 1 or settings.num_workers < 0:
            raise ConfigError(f"need size, batch_size > 0 and num_workers >= 0; got {settings}")
        self._settings, self._path = settings, str(weights_path)
        self._device = find_device(settings.device)
        self._backbone, self.card = load_backbone(
            weights_path, network=settings.network, num_heads=settings.num_heads
        )
        if settings.size < least_side(self._backbone):
            raise ConfigError(f"size: {settings.size} pixels are less than a patch")
        self.decoder = Decoder(self.card.backbone.in_chans, self.card.max_pixel_value)

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
        """Measure, and say what was measured and how."""
        database, blocks = _each_once(originals, distractors, blocks)
        left_out = sum(len(part.source) - len(part) for part in database)
        if left_out:
            log.warning(
                "%d pictures of the database are left out: they are, byte for byte, an original"
                " that is asked for or a query",
                left_out,
            )
        score, size = self._measure(self._backbone, database, blocks)
        floors = {block.name: _random(block, images=size) for block in blocks}
        report: dict[str, object] = {
            "task": "copies",
            "weights": self._path,
            "weights_source": self.card.source,
            "backbone": asdict(self.card.backbone),
            "data": {
                **data,
                "database": size,
                "same_as_asked_for": left_out,
                "queries": {block.name: len(block.queries) for block in blocks},
            },
            "protocol": self._protocol(),
            "score": _headline(score),
            "floors": _headline(floors),
        }
        if self._settings.untrained:
            fresh = untrained_backbone(self.card)
            report["untrained"] = _headline(self._measure(fresh, database, blocks)[0])
        return report

    def _measure(
        self, backbone: nn.Module, database: Sequence[_Part], blocks: Sequence[_Block]
    ) -> tuple[Scores, int]:
        """Percent of every block, and the number of images in the database."""
        network = CopyDescriptor(backbone).to(self._device)
        described = [self._describe(network, part) for part in database]
        bank = torch.cat([descriptors for descriptors, _ in described])
        numbers = database[0].numbers
        row_of = {numbers[place]: row for row, place in enumerate(described[0][1].tolist())}
        whitening = self._whitening(network)
        bank = unit(bank, whitening)
        scores = {}
        for block in blocks:
            descriptors, places = self._extract(network, block.queries)
            _check_readable(block, places, row_of, database[0].source)
            right = [[row_of[number] for number in numbers] for numbers in block.right]
            scores[block.name] = score_copies(unit(descriptors, whitening), bank, right)
        return scores, len(bank)

    def _whitening(self, network: nn.Module) -> Whitening | None:
        spec = self._settings.whitening
        if spec is None:
            return None
        source = open_source(spec, self.decoder)
        descriptors, _ = self._describe(network, _Part(source, range(len(source))))
        if not len(descriptors):
            raise DataError(f"{spec}: none of the images can be read")
        return learn_whitening(descriptors)

    def _describe(self, network: nn.Module, part: _Part) -> tuple[Tensor, Tensor]:
        return self._extract(network, self.squares(part.source, part.numbers))

    def _extract(self, network: nn.Module, squares: Squares) -> tuple[Tensor, Tensor]:
        """Descriptors (N, E) of the readable squares, and their places (N,)."""
        settings = self._settings
        return extract_features(
            network,
            squares,
            resize=settings.size,
            crop=settings.size,
            mean=self.card.mean,
            std=self.card.std,
            batch_size=settings.batch_size,
            device=self._device,
            num_workers=settings.num_workers,
            progress=settings.progress,
        )

    def _protocol(self) -> dict[str, object]:
        return {
            "method": "cosine similarity of whitened descriptors; only the first ranks count",
            "features": "normalised CLS token and generalised mean of the patch tokens",
            "network": self._settings.network,
            "gem_power": GEM_POWER,
            "size": self._settings.size,
            "interpolation": "bicubic, to a square",
            "whitening": self._settings.whitening,
            "depth": DEPTH,
            "average_precision": "trapezoids",
            "mean": list(self.card.mean),
            "std": list(self.card.std),
            "headline": f"block {HEADLINE} if there is one, else the mean over the blocks",
            "floor": "expectation of a random order",
        }


def _each_once(
    originals: Source, distractors: Source | None, blocks: Sequence[_Block]
) -> tuple[list[_Part], list[_Block]]:
    """The database with each original that is asked for once, and no query; what then is right.

    A second one of the same bytes would be as similar, and count as a mistake.
    """
    wanted = sorted({i for block in blocks for numbers in block.right for i in numbers})
    first = {i: min(same) for i, same in equal_pictures(originals, wanted, originals).items()}
    blocks = [
        replace(block, right=[tuple(sorted({first.get(i, i) for i in x})) for x in block.right])
        for block in blocks
    ]
    database = [_Part(originals, [i for i in range(len(originals)) if first.get(i, i) == i])]
    if distractors is not None:
        asked = blocks[0].queries.source
        same = {*equal_pictures(originals, wanted, distractors)}
        same |= {*equal_pictures(asked, range(len(asked)), distractors)}
        others = [i for i in range(len(distractors)) if i not in same]
        database.append(_Part(distractors, others))
    return database, blocks


def _check_readable(
    block: _Block, places: Tensor, row_of: Mapping[int, int], originals: Source
) -> None:
    """Refuse to measure with other queries, or without the images that they ask for."""
    unread = sorted(set(range(len(block.queries))) - set(places.tolist()))
    wanted = {number for numbers in block.right for number in numbers}
    lost = sorted(wanted - row_of.keys())
    paths = [block.queries.path(i) for i in unread] + [originals.path(number) for number in lost]
    if paths:
        raise DataError(
            f"{len(paths)} originals or queries of the block {block.name} cannot be read, the "
            f"first is {paths[0]}. Mend them or leave both out."
        )


def score_copies(queries: Tensor, bank: Tensor, right: Sequence[Sequence[int]]) -> float:
    """Mean average precision (trapezoids) of the first 20 ranks, in percent.

    Of equally similar images the one that stands first in the bank is nearer. No more than
    `TEST_CHUNK` x `BANK_CHUNK` cosines of `knn` are held at a time.

    Args:
        queries: (Q, E), of length 1.
        bank: (N, E), of length 1.
        right: numbers of images of the bank for each query, at least one each.
    """
    chunks = queries.split(TEST_CHUNK)
    k = min(DEPTH, len(bank))
    nearest = torch.cat([nearest_neighbours(bank, chunk, k=k)[1] for chunk in chunks]).cpu().numpy()
    hits = np.stack([np.isin(ranks, wanted) for ranks, wanted in zip(nearest, right, strict=True)])
    counts = torch.tensor([len(wanted) for wanted in right])
    return 100 * float(trapezoid_precision(torch.from_numpy(hits), counts).mean())


def _random(block: _Block, *, images: int) -> float:
    """What a random order is expected to give, in percent."""
    found = [
        random_precision(images=images, positives=len(wanted), depth=DEPTH, trapezoids=True)
        for wanted in block.right
    ]
    return 100 * float(np.mean(found))


def _headline(blocks: Scores) -> Scores:
    """The number to report before those of the blocks."""
    first = blocks.get(HEADLINE, float(np.mean(list(blocks.values()))))
    return {"mAP": first, **{f"mAP {name}": value for name, value in blocks.items()}}
