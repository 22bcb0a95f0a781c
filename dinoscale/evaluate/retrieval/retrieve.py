"""Image retrieval by frozen features: a labelled set, where images of one class find each other.

Shape letters: Q queries, N images, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dinoscale.convert.card import BackboneCard
from dinoscale.convert.weights import Network
from dinoscale.convert.weights_file import load_backbone
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.mixture import left_out_counts
from dinoscale.data.sources.source import open_source
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.features import check_labels, extract_features, find_device
from dinoscale.evaluate.retrieval.multi_scale import SCALES, MultiScale, least_side
from dinoscale.evaluate.retrieval.ranking import average_precision, random_precision
from dinoscale.evaluate.untrained import untrained_backbone

DEPTHS = (1, 5, 10)  # ranks of the precision
SIMILARITIES_PER_CHUNK = 2**24  # sorted at a time, with indices some 400 MiB
_SEED = 0  # of which images are queries

Scores = dict[str, float]


def evaluate_retrieve(
    weights_path: str | Path,
    spec: str,
    *,
    queries: int | None = None,
    multi_scale: bool = False,
    untrained: bool = False,
    batch_size: int = 64,
    num_workers: int = 2,
    device: str | None = None,
    network: Network = "teacher",
    num_heads: int | None = None,
    progress: bool = True,
) -> dict[str, object]:
    """Rank all other images by their similarity to each query; those of its class are right.

    Args:
        weights_path: of a backbone.
        spec: labelled images, as `data.train` of a config.
        queries: how many images are queries, drawn at random and always the same; None takes all.
        multi_scale: average the features of three scales.
        untrained: also measure the same architecture with fresh weights.
        batch_size: images in one forward.
        num_workers: processes that decode images.
        device: a torch device; None takes the accelerator if there is one.
        network: which of the two of a run or a full checkpoint.
        num_heads: for files that do not tell.
        progress: draw bars on stderr, if that is a terminal.

    Returns:
        What was measured and how, ready for JSON. Scores in percent: mAP (step rule) and the
        precision among the first 1, 5 and 10; `floors` are those of a random order.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range.
        DataError: the images cannot be read, have no labels, or only one class.
    """
    if batch_size < 1 or num_workers < 0 or (queries is not None and queries < 1):
        found = f"{batch_size}, {num_workers}, {queries}"
        raise ConfigError(f"need batch_size > 0, num_workers >= 0, queries > 0; got {found}")
    where = find_device(device)
    backbone, card = load_backbone(weights_path, network=network, num_heads=num_heads)
    source = open_source(spec, Decoder(card.backbone.in_chans, card.max_pixel_value))
    check_labels(source, name="retrieve")
    extract = partial(
        extract_features,
        source=source,
        resize=card.resize,
        crop=card.crop,
        mean=card.mean,
        std=card.std,
        batch_size=batch_size,
        device=where,
        num_workers=num_workers,
        progress=progress,
    )

    def measure(network: nn.Module) -> tuple[Scores, Tensor, Tensor]:
        network = MultiScale(network) if multi_scale else network
        if card.crop < least_side(network):
            raise ConfigError(f"images of {card.crop} pixels have no patch left at every scale")
        features, labels = extract(network.to(where))
        chosen = _queries(labels, count=queries, spec=spec)
        return score_labels(features, labels, chosen, progress=progress), labels, chosen

    score, labels, chosen = measure(backbone)
    report: dict[str, object] = {
        "task": "retrieve",
        "weights": str(weights_path),
        "weights_source": card.source,
        "backbone": asdict(card.backbone),
        "data": {
            "spec": spec,
            "images": len(labels),
            "left_out": left_out_counts(source),
            "queries": len(chosen),
        },
        "protocol": {"network": network} | _protocol(card, multi_scale=multi_scale),
        "score": score,
        "floors": _random(labels, chosen),
    }
    if untrained:
        report["untrained"] = measure(untrained_backbone(card))[0]
    return report


def _protocol(card: BackboneCard, *, multi_scale: bool) -> dict[str, object]:
    return {
        "method": "cosine similarity; images of the class of the query are right, the query "
        "itself is left out",
        "features": "backbone output (of a ViT: normalised CLS token), L2-normalised",
        "average_precision": "step rule",
        "scales": list(SCALES) if multi_scale else [1.0],
        "resize": card.resize,
        "crop": card.crop,
        "mean": list(card.mean),
        "std": list(card.std),
        "floor": "expectation of a random order",
    }


def _queries(labels: Tensor, *, count: int | None, spec: str) -> Tensor:
    """Numbers of the queries: images whose class has another image."""
    sizes = labels.bincount()
    if int((sizes > 0).sum()) < 2:
        raise DataError(
            f"{spec}: the readable images have fewer than two classes, every order is right. Take "
            "images of several classes."
        )
    useful = (sizes[labels] > 1).nonzero().flatten()
    if not len(useful):
        raise DataError(f"{spec}: no class has two images, there is nothing to find.")
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
        features: (N, D), of any length.
        labels: (N,) int64; each query has another image of its class.
        queries: (Q,) int64, numbers of images.
        depths: ranks of the precisions.
        progress: draw a bar on stderr, if that is a terminal.
    """
    bank = F.normalize(features.float(), dim=1)
    chunks = queries.split(max(1, SIMILARITIES_PER_CHUNK // len(bank)))
    found = []
    for chunk in tqdm(chunks, unit="chunk", disable=None if progress else True):
        similarity = (bank[chunk] @ bank.T).scatter(1, chunk[:, None], -torch.inf)
        order = similarity.sort(dim=1, descending=True, stable=True).indices[
            :, :-1
        ]  # without itself
        hits = labels[order] == labels[chunk, None]  # (chunk, N - 1)
        precisions = [average_precision(hits, hits.sum(dim=1))]
        precisions += [hits[:, :depth].double().mean(dim=1) for depth in depths]
        found.append(torch.stack(precisions, dim=1))
    means = 100 * torch.cat(found).mean(dim=0)
    names = ["mAP", *(f"P@{depth}" for depth in depths)]
    return dict(zip(names, means.tolist(), strict=True))


def _random(labels: Tensor, queries: Tensor) -> Scores:
    """What a random order is expected to give, in percent."""
    others = len(labels) - 1
    sizes, counts = (labels.bincount()[labels[queries]] - 1).unique(return_counts=True)
    weights = (counts / counts.sum()).tolist()
    pairs = list(zip(sizes.tolist(), weights, strict=True))
    mean = sum(w * random_precision(images=others, positives=n, trapezoids=False) for n, w in pairs)
    share = sum(weight * size / others for size, weight in pairs)
    return {"mAP": 100 * mean, **{f"P@{depth}": 100 * share for depth in DEPTHS}}
