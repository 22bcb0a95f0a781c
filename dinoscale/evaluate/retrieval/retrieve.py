"""Image retrieval by frozen features on a labelled set: images of a query's class are positives.

Shape letters: Q queries, N images, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dinoscale.data.sources.mixture import left_out_counts
from dinoscale.data.sources.source import Source
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.features import check_labels
from dinoscale.evaluate.frozen_backbone import (
    DEFAULT_EXTRACTION,
    OUTPUT,
    ExtractionOptions,
    FeatureExtractor,
    load_extractor,
)
from dinoscale.evaluate.progress import bar_options
from dinoscale.evaluate.retrieval.multi_scale import SCALES, MultiScale, least_side
from dinoscale.evaluate.retrieval.ranking import average_precision, random_precision
from dinoscale.runtime.opening import open_once_per_node

DEPTHS = (1, 5, 10)  # ranks of the precision
SIMILARITIES_PER_CHUNK = 2**24  # sorted at a time; about 400 MiB with indices
_SEED = 0  # of the choice of queries

Scores = dict[str, float]


def evaluate_retrieve(
    weights_path: str | Path,
    spec: str,
    *,
    queries: int | None = None,
    multi_scale: bool = False,
    untrained: bool = False,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Rank all other images by similarity to each query; those of its class are positives.

    All ranks of a job call it and share the extraction; all get the report.

    Args:
        weights_path: of a backbone.
        spec: labelled images, as `data.train` of a config.
        queries: how many images are queries, chosen at random with a fixed seed; None takes all.
        multi_scale: average the features of three scales.
        untrained: also measure the same architecture with fresh weights.
        options: which network, which device, and how features are extracted and cached.

    Returns:
        What was measured and how, ready for JSON. Scores in percent: mAP (step rule) and the
        precision among the first 1, 5 and 10; `floors` are those of a random order.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range.
        DataError: the images cannot be read, have no labels, or only one class.
    """
    if queries is not None and queries < 1:
        raise ConfigError(f"queries: need at least one, got {queries}")
    extractor = load_extractor(weights_path, options)
    source = open_once_per_node(partial(extractor.open, spec))
    check_labels(source, name="retrieve")
    measure = partial(_measure, source=source, spec=spec, queries=queries, multi_scale=multi_scale)
    score, labels, chosen = measure(extractor)
    data = {
        "spec": spec,
        "images": len(labels),
        "left_out": left_out_counts(source),
        "queries": len(chosen),
    }
    protocol = _protocol(extractor, multi_scale=multi_scale)
    report = extractor.report(
        "retrieve",
        data=data,
        protocol={"network": options.network, **protocol},
        score=score,
        floors=_random(labels, chosen),
    )
    if untrained:
        report["untrained"] = measure(extractor.untrained())[0]
    return report


def _measure(
    extractor: FeatureExtractor,
    source: Source,
    *,
    spec: str,
    queries: int | None,
    multi_scale: bool,
) -> tuple[Scores, Tensor, Tensor]:
    """Scores, labels (N,) of the readable images, and indices of the queries (Q,)."""
    network = MultiScale(extractor.backbone) if multi_scale else extractor.backbone
    crop = extractor.card.crop
    if crop < least_side(network):
        raise ConfigError(f"images of {crop} pixels have no patch left at every scale")
    key = f"{OUTPUT}, mean of the scales {SCALES}" if multi_scale else OUTPUT
    features, labels = extractor.features(source, network, output_key=key)
    chosen = _queries(labels, count=queries, spec=spec)
    progress = extractor.options.progress
    return score_labels(features, labels, chosen, progress=progress), labels, chosen


def _protocol(extractor: FeatureExtractor, *, multi_scale: bool) -> dict[str, object]:
    return {
        "method": "cosine similarity; images of the class of the query are right, the query "
        "itself is left out",
        "features": "backbone output (of a ViT: normalised CLS token), L2-normalised",
        "average_precision": "step rule",
        "scales": list(SCALES) if multi_scale else [1.0],
        "resize": extractor.card.resize,
        "crop": extractor.card.crop,
        **extractor.normalisation,
        "floor": "expectation of a random order",
    }


def _queries(labels: Tensor, *, count: int | None, spec: str) -> Tensor:
    """Indices of the queries: images whose class has another image."""
    sizes = labels.bincount()
    if int((sizes > 0).sum()) < 2:
        raise DataError(
            f"{spec}: the readable images have fewer than two classes, so every order is perfect. "
            "Use images of several classes."
        )
    useful = (sizes[labels] > 1).nonzero().flatten()
    if not len(useful):
        raise DataError(f"{spec}: no class has two images, so no query has a positive.")
    if count is None or count >= len(useful):
        return useful
    order = np.random.default_rng(_SEED).permutation(len(useful))[:count]
    return useful[torch.from_numpy(np.sort(order)).to(useful.device)]


def score_labels(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    depths: Sequence[int] = DEPTHS,
    progress: bool = False,
) -> Scores:
    """Mean average precision and precisions at ranks, in percent.

    Args:
        features: (N, D), of any norm.
        labels: (N,) int64; each query has another image of its class.
        queries: (Q,) int64, indices of images.
        depths: ranks of the precisions.
        progress: draw a bar (`bar_options`).
    """
    bank = F.normalize(features.float(), dim=1)
    chunks = queries.split(max(1, SIMILARITIES_PER_CHUNK // len(bank)))
    found = []
    for chunk in tqdm(chunks, unit="chunk", **bar_options(shown=progress)):
        similarity = (bank[chunk] @ bank.T).scatter(1, chunk[:, None], -torch.inf)
        order = similarity.sort(dim=1, descending=True, stable=True).indices
        order = order[:, :-1]  # without the query itself
        hits = labels[order] == labels[chunk, None]  # (chunk, N - 1)
        precisions = [average_precision(hits, hits.sum(dim=1))]
        precisions += [hits[:, :depth].double().mean(dim=1) for depth in depths]
        found.append(torch.stack(precisions, dim=1))
    means = 100 * torch.cat(found).mean(dim=0)
    names = ["mAP", *(f"P@{depth}" for depth in depths)]
    return dict(zip(names, means.tolist(), strict=True))


def _random(labels: Tensor, queries: Tensor) -> Scores:
    """Expected scores of a random order, in percent."""
    others = len(labels) - 1
    sizes, counts = (labels.bincount()[labels[queries]] - 1).unique(return_counts=True)
    weights = (counts / counts.sum()).tolist()
    pairs = list(zip(sizes.tolist(), weights, strict=True))
    mean = sum(w * random_precision(images=others, positives=n, trapezoids=False) for n, w in pairs)
    share = sum(weight * size / others for size, weight in pairs)
    return {"mAP": 100 * mean, **{f"P@{depth}": 100 * share for depth in DEPTHS}}
