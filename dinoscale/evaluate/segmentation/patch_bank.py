"""Patches whose class is known, and the classes of others by their votes.

Shape letters: B patches of the bank, Q patches of images, D width, K classes.
Source: k-NN on patch features as in CAPI (Darcet et al. 2025, arXiv:2502.08769), votes as in the
k-NN of Wu et al. 2018 (arXiv:1805.01978).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinoscale.data.seeding import Stream, generator
from dinoscale.data.transfer import to_device
from dinoscale.errors import DataError
from dinoscale.evaluate.any_size import Fit
from dinoscale.evaluate.dense_probes.pairs import Pairs, Reading, whole_images
from dinoscale.evaluate.dense_probes.patch_maps import Maps
from dinoscale.evaluate.segmentation.index_masks import NOT_A_CLASS, patch_classes

_SIMILARITIES_AT_ONCE = 2**26  # 256 MiB of float32


class Bank(NamedTuple):
    """Patches of known class.

    Attributes:
        features: (B, D) float32, of length 1.
        classes: (B,) int64.
        images: of each patch, (B,) int64.
    """

    features: Tensor
    classes: Tensor
    images: Tensor


def fill_bank(
    maps: Maps, pairs: Pairs, fit: Fit, reading: Reading, *, patches: int, seed: int
) -> Bank:
    """Take patches of all images of a set, equally many of each.

    Args:
        maps: makes their features.
        pairs: images and masks.
        fit: how images become whole patches.
        reading: how they are read.
        patches: most patches of the bank, B; those of an image are drawn by (seed, image).
        seed: >= 0.

    Raises:
        DataError: all pixels of the masks are void.
    """
    of_each = max(1, patches // len(pairs.indices))
    features, classes, images = [], [], []
    for batch in whole_images(pairs, fit.squeeze, reading):
        made = maps(reading.normalized(batch.images))  # (N, D, R, S)
        for one, mask, index in zip(made, batch.targets, batch.indices, strict=True):
            found = patch_classes(mask, rows=one.shape[1], columns=one.shape[2]).ravel()
            known = np.flatnonzero(found != NOT_A_CLASS)
            rng = generator(seed, Stream.SUBSET, index)
            chosen = torch.from_numpy(np.sort(rng.permutation(known)[:of_each]))
            rows = one.flatten(1).T[to_device(chosen, one.device)]
            features.append(F.normalize(rows, dim=1))
            classes.append(torch.from_numpy(found)[chosen])
            images.append(torch.full_like(chosen, index))
    bank = Bank(torch.cat(features), torch.cat(classes).to(reading.device), torch.cat(images))
    if not len(bank.classes):
        raise DataError(f"{pairs.part.images}: all pixels of its masks are void (255)")
    return bank


def votes(features: Tensor, bank: Bank, *, num_classes: int, k: int, temp: float) -> Tensor:
    """Let the k most similar patches of the bank vote: weights softmax(cosine / temp).

    Args:
        features: (Q, D) of length 1.
        bank: on the same device.
        num_classes: K.
        k: >= 1; a smaller bank votes as a whole.
        temp: > 0, dimensionless.

    Returns:
        (Q, K); rows sum to 1.
    """
    at_once = max(1, _SIMILARITIES_AT_ONCE // len(bank.features))
    scores = features.new_zeros(len(features), num_classes)
    for rows, result in zip(features.split(at_once), scores.split(at_once), strict=True):
        similar, nearest = (rows @ bank.features.T).topk(min(k, len(bank.features)), dim=1)
        result.scatter_add_(1, bank.classes[nearest], (similar / temp).softmax(dim=1))
    return scores
