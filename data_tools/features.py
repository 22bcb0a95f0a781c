"""Pairs of pictures with similar features of a trained backbone.

Shape letters: N pictures, D width of the features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional as F

from data_tools.files import Files, Selection
from dinoscale.convert.weights_file import load_backbone
from dinoscale.evaluate.features import extract_features, find_device

_BATCH = 64  # images of one forward
_COSINES = 2**26  # held at a time: 256 MiB of float32


def similar_pairs(
    source: Files,
    ids: NDArray[np.int64],
    *,
    weights: str,
    num_heads: int | None,
    threshold: float,
    workers: int,
) -> Iterator[NDArray[np.int64]]:
    """Yield all pairs with a cosine of at least `threshold`, numbers of images (P, 2).

    Every picture is compared with every other: N^2 D operations, in blocks, on the accelerator if
    there is one; the features take 4 N D bytes. A million pictures need a GPU.

    Args:
        source: source of the pictures.
        ids: numbers of the pictures, (N,).
        weights: a weights file of dinoscale, or a checkpoint of the reference.
        num_heads: for a checkpoint whose attention heads are not 64 channels wide.
        threshold: least cosine.
        workers: number of processes that decode.

    Raises:
        CheckpointError: the weights cannot be used.
    """
    backbone, card = load_backbone(weights, num_heads=num_heads)
    device = find_device(None)
    features, numbers = extract_features(
        backbone.to(device),
        _Numbered(source, ids),
        resize=card.resize,
        crop=card.crop,
        mean=card.mean,
        std=card.std,
        batch_size=_BATCH,
        device=device,
        num_workers=workers,
        progress=True,
    )
    features = F.normalize(features, dim=1)  # (N, D)
    chunk = max(1, _COSINES // max(1, len(features)))
    for start in range(0, len(features), chunk):
        cosines = features[start : start + chunk] @ features[start:].T
        pairs = (cosines.triu(1) >= threshold).nonzero() + start
        yield numbers[pairs].cpu().numpy()


class _Numbered(Selection):
    """A selection whose labels are the numbers of the pictures, since unreadable ones drop out."""

    @property
    def labels(self) -> NDArray[np.int64]:
        return self._ids
