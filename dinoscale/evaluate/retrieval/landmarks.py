"""Landmark retrieval: revisited Oxford and Paris, or any ground truth in their layout.

Shape letters: Q queries, N images of the database, D width.
Source: Radenovic et al. 2018 (arXiv:1803.11285); features as in Caron et al. 2021
(arXiv:2104.14294), section 4.2.1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from dinoscale.convert.card import BackboneCard
from dinoscale.data.augmentation.multi_crop import to_image, to_pixels
from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.image_files import read_image_file
from dinoscale.data.transfer import to_device
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.any_size import image_mode
from dinoscale.evaluate.features import require_finite
from dinoscale.evaluate.frozen_backbone import (
    DEFAULT_LOADING,
    LoadedBackbone,
    LoadOptions,
    load_frozen,
)
from dinoscale.evaluate.progress import bar_options
from dinoscale.evaluate.retrieval.ground_truth import SETUPS, GroundTruth, Truth, read_ground_truth
from dinoscale.evaluate.retrieval.multi_scale import SCALES, MultiScale, least_side
from dinoscale.evaluate.retrieval.ranking import random_precision, trapezoid_precision
from dinoscale.evaluate.retrieval.retrieve import SIMILARITIES_PER_CHUNK

SIZE = 224  # pixels, longer side at most; published numbers of Paris: 512, at three scales
DEPTHS = (1, 5, 10)  # k of mP@k

Scores = dict[str, float]


def evaluate_landmarks(
    weights_path: str | Path,
    images: str | Path,
    ground_truth: str | Path,
    *,
    size: int = SIZE,
    multi_scale: bool = False,
    untrained: bool = False,
    options: LoadOptions = DEFAULT_LOADING,
) -> dict[str, object]:
    """Measure a weights file by the protocol of revisited Oxford and Paris.

    Args:
        weights_path: of a backbone.
        images: folder of NAME.jpg, or with a folder `jpg` that holds them.
        ground_truth: JSON, see `ground_truth`.
        size: longer side at most, pixels; smaller images keep their size.
        multi_scale: average the features of three scales.
        untrained: also measure the same architecture with fresh weights.
        options: which network, and which device.

    Returns:
        What was measured and how, ready for JSON. Scores in percent, of the medium, hard and easy
        setup: mAP (trapezoids) and mP@k, the precision among the first k or, where all positives
        come earlier, up to the last of them. `floors` are mAP of a random order.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range.
        DataError: the ground truth or an image cannot be read, or no query has positives.
    """
    if size < 1:
        raise ConfigError(f"imsize: need a number of pixels above 0, got {size}")
    loaded = load_frozen(weights_path, options)
    image_mode(channels=loaded.card.backbone.in_chans)
    truth = read_ground_truth(ground_truth)
    sets = [_paths(Path(images), names) for names in (truth.images, truth.queries)]
    measure = partial(_measure, sets=sets, truth=truth, size=size, multi_scale=multi_scale)
    score = measure(loaded)
    if not score:
        raise DataError(f"{ground_truth}: no query has an easy or hard image.")
    data = {"images": str(images), "ground_truth": str(ground_truth)}
    protocol = _protocol(loaded, size=size, multi_scale=multi_scale)
    report = loaded.report(
        "retrieve",
        data={**data, "database": len(sets[0]), "queries": len(sets[1])},
        protocol={"network": options.network, **protocol},
        score=score,
        floors=_random(truth),
    )
    if untrained:
        report["untrained"] = measure(loaded.untrained())
    return report


def _measure(
    loaded: LoadedBackbone,
    *,
    sets: Sequence[Sequence[Path]],
    truth: GroundTruth,
    size: int,
    multi_scale: bool,
) -> Scores:
    """Scores of a network on the files of the database and of the queries."""
    network = MultiScale(loaded.backbone) if multi_scale else loaded.backbone
    shown = loaded.options.progress
    bank, queries = (
        describe_files(network, paths, card=loaded.card, size=size, progress=shown)
        for paths in sets
    )
    return score_setups(_rankings(queries, bank), truth.truths)


def _protocol(loaded: LoadedBackbone, *, size: int, multi_scale: bool) -> dict[str, object]:
    return {
        "method": "cosine similarity of whole images, no whitening; junk is left out of rankings",
        "features": "backbone output (of a ViT: normalised CLS token), L2-normalised",
        "average_precision": "trapezoids",
        "imsize": size,
        "interpolation": "Lanczos",
        "scales": list(SCALES) if multi_scale else [1.0],
        **loaded.normalisation,
        "floor": "expectation of a random order",
    }


def _paths(folder: Path, names: Sequence[str]) -> list[Path]:
    """Files of the names; all of them must exist."""
    inner = folder / "jpg"
    place = inner if inner.is_dir() else folder
    files = [place / (name if os.path.splitext(name)[1] else f"{name}.jpg") for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} images of the ground truth are not in {place}, the "
            f"first is {missing[0].name}. Add them, or correct --images."
        )
    return files


def describe_files(
    backbone: nn.Module,
    paths: Sequence[Path],
    *,
    card: BackboneCard,
    size: int,
    progress: bool = False,
) -> Tensor:
    """Features of images of any shape, one by one, (N, D) float32 of norm 1.

    Args:
        backbone: in eval mode.
        paths: of the files.
        card: channels, mean and std of the images.
        size: longer side at most, pixels.
        progress: draw a bar (`bar_options`).

    Raises:
        DataError: an image cannot be read, or is smaller than a patch.
        NonFiniteError: a feature is not a finite number.
    """
    decoder = Decoder(card.backbone.in_chans, card.max_pixel_value)
    weight = next(backbone.parameters())
    least = least_side(backbone)
    features = []
    for path in tqdm(paths, unit="img", **bar_options(shown=progress)):
        pixels = decoder.open(read_image_file(str(path)), str(path)).pixels()
        small = _thumbnail(pixels, size=size)
        if min(small.shape[:2]) < least:
            raise DataError(
                f"{path}: is {small.shape[1]} x {small.shape[0]} pixels at an imsize of {size}, "
                f"the network needs {least} along both sides. Use a larger --imsize."
            )
        image = torch.from_numpy(small).permute(2, 0, 1)[None]
        moved = to_device(image, weight.device)
        normal = normalize_images(moved, mean=card.mean, std=card.std)
        with torch.no_grad():
            features.append(backbone([normal.to(weight.dtype)]).float())
    return F.normalize(require_finite(torch.cat(features)), dim=1)


def _thumbnail(pixels: NDArray[np.uint8], *, size: int) -> NDArray[np.uint8]:
    image = to_image(pixels)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return to_pixels(image).copy()


def _rankings(queries: Tensor, bank: Tensor) -> Iterator[NDArray[np.int64]]:
    """Indices of all images of the bank (N,), the most similar first, for each query in turn."""
    for chunk in queries.split(max(1, SIMILARITIES_PER_CHUNK // len(bank))):
        order = (chunk @ bank.T).argsort(dim=1, descending=True, stable=True)
        yield from order.cpu().numpy()


def score_setups(rankings: Iterable[NDArray[np.int64]], truths: Sequence[Truth]) -> Scores:
    """Mean average precision and precisions at k of every setup, in percent.

    Queries without positives in a setup are left out of its means; a setup where no query has
    positives is left out.

    Args:
        rankings: indices of images (N,), the most similar first, for each query.
        truths: one per query.
    """
    found: dict[str, list[list[float]]] = {setup: [] for setup in SETUPS}
    for ranking, truth in zip(rankings, truths, strict=True):
        for setup, (wanted, left_out) in SETUPS.items():
            positives = _numbers(truth, wanted)
            if positives:
                kept = ranking[~np.isin(ranking, _numbers(truth, left_out))]
                found[setup].append(_query_scores(np.isin(kept, positives)))
    names = ("mAP", *(f"mP@{depth}" for depth in DEPTHS))
    return {
        f"{setup} {name}": 100 * float(value)
        for setup, of_setup in found.items()
        if of_setup
        for name, value in zip(names, np.mean(of_setup, axis=0), strict=True)
    }


def _numbers(truth: Truth, kinds: Sequence[str]) -> list[int]:
    return [number for kind in kinds for number in getattr(truth, kind)]


def _query_scores(hits: NDArray[np.bool_]) -> list[float]:
    """Average precision and precisions at k of one query."""
    total, last = int(hits.sum()), int(hits.nonzero()[0].max()) + 1
    average = trapezoid_precision(torch.from_numpy(hits)[None], torch.tensor([total]))
    depths = [min(depth, last) for depth in DEPTHS]
    return [float(average), *(float(hits[:depth].mean()) for depth in depths)]


def _random(truth: GroundTruth) -> Scores:
    """Expected mean average precision of a random order in every setup, in percent."""
    scores = {}
    for setup, (wanted, left_out) in SETUPS.items():
        pairs = [(len(_numbers(x, wanted)), len(_numbers(x, left_out))) for x in truth.truths]
        found = [
            random_precision(images=len(truth.images) - junk, positives=positives, trapezoids=True)
            for positives, junk in pairs
            if positives
        ]
        if found:
            scores[f"{setup} mAP"] = 100 * float(np.mean(found))
    return scores
