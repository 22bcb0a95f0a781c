"""How classes are predicted from patch features: three protocols, with published numbers.

Shape letters: N images, C channels, H, W pixels, K classes.
Sources: k-NN and logistic regression on patches as in CAPI (Darcet et al. 2025, arXiv:2502.08769);
`Linear` after the configuration of DINOv3 (Simeoni et al. 2025, arXiv:2508.10104).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinoscale.errors import ConfigError
from dinoscale.evaluate.any_size import Fit
from dinoscale.evaluate.dense_probes.linear_head import HeadTraining, LinearHead, Loss, Recipe
from dinoscale.evaluate.dense_probes.pair_crops import CropRule, ResizeShort
from dinoscale.evaluate.dense_probes.pairs import Pairs, Reading, Resize
from dinoscale.evaluate.dense_probes.patch_maps import Maps
from dinoscale.evaluate.dense_probes.sliding import slide, to_pixels
from dinoscale.evaluate.segmentation.index_masks import VOID
from dinoscale.evaluate.segmentation.patch_bank import Bank, fill_bank, votes
from dinoscale.evaluate.segmentation.patch_logistic import fit_bank

SIZE = 512  # pixels, short side of an image
RECIPE = Recipe(
    iterations=40_000,
    batch_size=16,
    lr=1e-3,
    weight_decay=1e-3,
    warmup=1500 / 40_000,
    clip=35.0,
    dropout=0.1,
)
_SEEN = {
    "edges": "images are resized to whole patches, so that the map covers all of them",
    "patch_class": "of most of its pixels, void left out",
}

# Maps images (N, C, H, W), normalised, to scores (N, K, rows, columns) of any resolution.
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Patches:
    """What both protocols on a bank of patches share.

    Attributes:
        size: short side of an image in pixels.
        bank: most patches of the train set that are used.
    """

    size: int = SIZE
    bank: int = 200_000

    def resize(self, patch: int) -> Resize:
        """How a test image is resized."""
        return self._fit(patch).squeeze

    def filled(self, maps: Maps, train: Pairs, reading: Reading, *, seed: int) -> Bank:
        """Patches of the train set."""
        return fill_bank(maps, train, self._fit(maps.patch), reading, patches=self.bank, seed=seed)

    def protocol(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        return {**asdict(self), **_SEEN, "resize": "bicubic"}

    def _fit(self, patch: int) -> Fit:
        return Fit(patch, self.size)


@dataclass(frozen=True)
class Knn(_Patches):
    """Votes of the most similar patches of the train set; nothing is trained.

    Attributes:
        k: patches that vote.
        temp: of the votes, dimensionless.
    """

    k: int = 30
    temp: float = 0.07

    def __post_init__(self) -> None:
        if min(self.k, self.bank) < 1 or not self.temp > 0:
            numbers = f"{self.k}, {self.bank} and {self.temp}"
            raise ConfigError(f"need k, bank and temp above 0, got {numbers}")

    def fitted(
        self, maps: Maps, train: Pairs, reading: Reading, *, num_classes: int, seed: int
    ) -> tuple[Predict, dict[str, object]]:
        """The prediction on these features, and what the report says of it."""
        bank = self.filled(maps, train, reading, seed=seed)

        def of_rows(rows: Tensor) -> Tensor:
            return votes(rows, bank, num_classes=num_classes, k=self.k, temp=self.temp)

        return _on_patches(maps, of_rows), {"bank": len(bank.classes)}


@dataclass(frozen=True)
class Logistic(_Patches):
    """Logistic regression on single patches; every tenth train image chooses its penalty.

    Attributes:
        cs: inverse strengths of the L2 penalty, as scikit-learn's C; one is taken as it is.
        max_iter: of L-BFGS.
    """

    cs: tuple[float, ...] = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5)
    max_iter: int = 1000

    def __post_init__(self) -> None:
        if not self.cs or min(self.cs) <= 0 or min(self.max_iter, self.bank) < 1:
            numbers = f"{[*self.cs]}, {self.max_iter} and {self.bank}"
            raise ConfigError(f"need C, max_iter and bank above 0, got {numbers}")

    def fitted(
        self, maps: Maps, train: Pairs, reading: Reading, *, num_classes: int, seed: int
    ) -> tuple[Predict, dict[str, object]]:
        """The prediction on these features, and what the report says of it."""
        bank = self.filled(maps, train, reading, seed=seed)
        found = fit_bank(bank, num_classes=num_classes, cs=self.cs, max_iter=self.max_iter)
        said = {"bank": len(bank.classes), "c": found.c, "held_out": found.held_out}
        return _on_patches(maps, found.classifier.probabilities), said


@dataclass(frozen=True)
class Linear:
    """Batch norm and a linear layer, trained on random crops, tested by sliding windows.

    Attributes:
        size: short side of an image in pixels; of a train image times a random ratio.
        crop: side of a train crop and of a window, pixels.
        stride: pixels between two windows.
        ratio: lowest and highest.
        recipe: of the optimizer.
    """

    size: int = SIZE
    crop: int = SIZE
    stride: int = 341
    ratio: tuple[float, float] = (0.5, 2.0)
    recipe: Recipe = RECIPE

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.crop or self.size < 1:
            numbers = f"{self.size}, {self.crop} and {self.stride}"
            raise ConfigError(f"need size > 0 and 1 <= stride <= crop, got {numbers}")

    @classmethod
    def of(cls, protocol: Mapping[str, Any]) -> Linear:
        """That of which `protocol` has said all; KeyError, TypeError or ValueError if not."""
        low, high = protocol["ratio"]
        sides = {name: int(protocol[name]) for name in ("size", "crop", "stride")}
        return cls(**sides, ratio=(low, high), recipe=Recipe.of(protocol))

    def resize(self, _: int) -> Resize:
        """How a test image is resized."""
        return ResizeShort(self.size)

    def training(self, train: Pairs, reading: Reading, *, patch: int, seed: int) -> HeadTraining:
        """How its head is trained."""
        crops = CropRule(self.crop, self.crop, self.size, self.ratio)
        return HeadTraining(train, crops, VOID, self.recipe, cross_entropy(patch), reading, seed)

    def predict(self, head: LinearHead, maps: Maps, *, batch_size: int) -> Predict:
        """The prediction of a trained head."""

        def scored(images: Tensor) -> Tensor:
            with torch.no_grad():
                return slide(
                    images,
                    lambda windows: head(maps(windows)),
                    patch=maps.patch,
                    window=self.crop,
                    stride=self.stride,
                    batch_size=batch_size,
                )

        return scored

    def protocol(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        return {
            "size": self.size,
            "crop": self.crop,
            "stride": self.stride,
            "ratio": list(self.ratio),
            **self.recipe.protocol(),
            "head": "batch norm, dropout of channels in training, 1 x 1 convolution",
            "loss": "cross-entropy of the logits enlarged to pixels, void left out",
            "train_images": "random scale, random crop, mirrored half of the time",
            "test_images": "windows averaged where they overlap",
            "test_time_augmentation": False,
            "resize": "bicubic, masks by nearest neighbour",
        }


def _on_patches(maps: Maps, of_rows: Callable[[Tensor], Tensor]) -> Predict:
    """Predict from single patches, scaled to length 1."""

    def scored(images: Tensor) -> Tensor:
        made = maps(images)
        rows = F.normalize(made.permute(0, 2, 3, 1).flatten(0, 2), dim=1)
        return of_rows(rows).view(*made.shape[:1], *made.shape[2:], -1).permute(0, 3, 1, 2)

    return scored


def cross_entropy(patch: int) -> Loss:
    """Mean cross-entropy over pixels that are not void, of logits enlarged to pixels; in nats."""

    def loss(logits: Tensor, masks: Tensor) -> Tensor:
        height, width = masks.shape[1:]
        enlarged = to_pixels(logits, patch=patch, height=height, width=width)
        total = F.cross_entropy(enlarged, masks.long(), ignore_index=VOID, reduction="sum")
        return total / (masks != VOID).sum().clamp(min=1)

    return loss
