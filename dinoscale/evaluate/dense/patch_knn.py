"""k-NN classification of single patches of drawn images, whose objects have masks.

A patch that its object's mask covers for more than half has the class of the image, any other is
background. The patches of labelled images vote on those of others, as whole images do in k-NN.

Shape letters: N images, P patches of an image, in rows of S, D width, p patch size, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dinoscale.data.sources.synthetic import ShapesSource
from dinoscale.evaluate.classification.knn import knn_accuracy
from dinoscale.evaluate.features import extract_unlabelled

BACKGROUND = 0  # class of patches; that of an image is one higher


@dataclass(frozen=True)
class PatchKnn:
    """The measurement, but for the network.

    Attributes:
        train: square images whose patches vote.
        test: those whose patches are classified.
        k: patches that vote.
        resize: side of an image after the resize, in pixels.
        crop: side of the centre crop, in pixels, whole patches.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        batch_size: images in one forward.
    """

    train: ShapesSource
    test: ShapesSource
    k: int
    resize: int
    crop: int
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int

    def measure(
        self,
        network: "PatchTokens | PatchPixels",
        *,
        device: torch.device,
        on_batch: Callable[[], None] = lambda: None,
    ) -> float:
        """Share of the test patches that are classified rightly, in percent; collective.

        Args:
            network: makes the features of the patches.
            device: of the network.
            on_batch: called after each batch.

        Raises:
            DinoscaleError: on every rank.
        """
        found = []
        for source in (self.train, self.test):
            features, numbers = extract_unlabelled(
                network,
                source,
                resize=self.resize,
                crop=self.crop,
                mean=self.mean,
                std=self.std,
                batch_size=self.batch_size,
                device=device,
                num_workers=0,  # a few small images
                on_batch=on_batch,
            )
            labels = [self._labels(source, index, network.side) for index in numbers.tolist()]
            rows = torch.from_numpy(np.concatenate(labels)).to(device)
            found += [features.view(len(rows), -1), rows]
        return knn_accuracy(*found, ks=(self.k,), on_chunk=on_batch)[self.k].top1

    def _labels(self, source: ShapesSource, index: int, side: int) -> NDArray[np.int64]:
        """Classes of the patches of an image, (P,)."""
        assert source.labels is not None
        whole = source.mask(index).resize((self.resize, self.resize), Image.Resampling.BOX)
        edge = (self.resize - self.crop) // 2
        cut = whole.crop((edge, edge, edge + self.crop, edge + self.crop))
        inside = (
            np.asarray(cut.resize((side, side), Image.Resampling.BOX)).flatten() > 128
        )  # of 255: not one half
        return np.where(inside, source.labels[index] + 1, BACKGROUND)


class PatchTokens(nn.Module):
    """Square images in a list of one, (N, C, S p, S p) -> the patch tokens of a ViT, (N, P D).

    Attributes:
        side: S.
        embed_dim: P D.
    """

    def __init__(self, backbone: Any, *, crop: int) -> None:
        """Measure a ViT on images of `crop` pixels, whole patches."""
        super().__init__()
        self.side = crop // int(backbone.patch_size)
        self.embed_dim = self.side**2 * int(backbone.embed_dim)
        self._backbone = backbone

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """All normalised patch tokens of the last block, those of an image side by side."""
        tokens: Tensor = self._backbone.features(images[0])
        return tokens[:, -(self.side**2) :].flatten(1)


class PatchPixels(nn.Module):
    """The same of the pixels themselves, (N, P C p^2): what colors alone tell."""

    def __init__(self, *, crop: int, patch_size: int) -> None:
        """Cut images of `crop` pixels into patches of p = `patch_size`."""
        super().__init__()
        self.side, self._patch_size = crop // patch_size, patch_size

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Pixels of each patch."""
        size = self._patch_size
        return F.unfold(images[0], size, stride=size).transpose(1, 2).flatten(1)
