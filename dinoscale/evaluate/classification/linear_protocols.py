"""The published linear probes: DINOv2's grid of classifiers, and DINO v1's single one.

Sources: Oquab et al. 2023 (arXiv:2304.07193), appendix B.3, and Caron et al. 2021
(arXiv:2104.14294), section 4.1, with the numbers of their published evaluation code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from dinoscale.data.augmentation.multi_crop import Interpolation
from dinoscale.engine.schedules import cosine
from dinoscale.errors import ConfigError
from dinoscale.evaluate.classification.linear_heads import FeatureKind, is_vit

LAST_BLOCKS = 4  # whose class tokens the wide inputs of both protocols join
POOLED_FROM = 768  # width of ViT-B, from which v1 takes one class token and the mean patch token
BATCH_SCALE = 256  # batch size for which the rates are stated
GRID_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@dataclass(frozen=True)
class ProbePlan:
    """What is trained on which input, how long, and when it is measured.

    Attributes:
        kinds: inputs, each with a classifier for every rate.
        rates: learning rates, already scaled by the batch.
        blocks: number of last blocks whose class tokens are needed.
        batch_size: images of a step.
        steps: in all.
        hold: steps with the same rate; the cosine falls after each `hold` steps.
        eval_every: steps between two measurements; the last step is followed by one, too.
        interpolation: of the training crops.
        last_only: choose the best classifier after the last step; else after any epoch.
    """

    kinds: tuple[FeatureKind, ...]
    rates: tuple[float, ...]
    blocks: int
    batch_size: int
    steps: int
    hold: int
    eval_every: int
    interpolation: Interpolation
    last_only: bool

    def factor(self, step: int) -> float:
        """Factor of all learning rates at a step: half a cosine from 1 towards 0."""
        periods = math.ceil(self.steps / self.hold)
        return cosine(step // self.hold, base=1.0, final=0.0, total_steps=periods)


@dataclass(frozen=True)
class GridProtocol:
    """DINOv2's: {1, 4 class tokens} x {with, without mean patch} x 13 rates, cosine by step.

    Attributes:
        iterations: steps; the published number is for ImageNet.
        batch_size: images of a step; rates are multiplied by batch_size / 256.
        eval_every: steps between two measurements; only the last one counts.
    """

    iterations: int = 12_500
    batch_size: int = 128
    eval_every: int = 1250

    def plan(self, backbone: nn.Module, *, images: int) -> ProbePlan:
        """Make the plan for a backbone; a train set of any size is repeated."""
        check_positive(iterations=self.iterations, batch_size=self.batch_size, images=images)
        check_positive(eval_every=self.eval_every)
        most = _most_blocks(backbone)
        pools = (False, True) if is_vit(backbone) else (False,)
        return ProbePlan(
            kinds=tuple(FeatureKind(n, pooled) for n in sorted({1, most}) for pooled in pools),
            rates=tuple(rate * self.batch_size / BATCH_SCALE for rate in GRID_RATES),
            blocks=most,
            batch_size=self.batch_size,
            steps=self.iterations,
            hold=1,
            eval_every=self.eval_every,
            interpolation="bicubic",
            last_only=True,
        )


@dataclass(frozen=True)
class DinoProtocol:
    """DINO v1's: four class tokens below width 768, else one and the mean patch; cosine by epoch.

    Differs: an epoch is the smallest number of full batches that hold as many images as the set;
    the reference ends each epoch with a smaller batch.

    Attributes:
        epochs: passes over the train set, each followed by a measurement.
        batch_size: images of a step; the rate is multiplied by batch_size / 256.
        lr: learning rate for 256 images; the paper sweeps it for each model.
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.001

    def plan(self, backbone: nn.Module, *, images: int) -> ProbePlan:
        """Make the plan for a backbone and a train set."""
        check_positive(epochs=self.epochs, batch_size=self.batch_size, images=images)
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr: need a number above 0, got {self.lr}")
        pooled = is_vit(backbone) and int(backbone.embed_dim) >= POOLED_FROM  # type: ignore[arg-type]  # an int
        blocks = 1 if pooled else _most_blocks(backbone)
        steps_per_epoch = math.ceil(images / self.batch_size)
        return ProbePlan(
            kinds=(FeatureKind(blocks, pooled, interleaved=pooled),),
            rates=(self.lr * self.batch_size / BATCH_SCALE,),
            blocks=blocks,
            batch_size=self.batch_size,
            steps=self.epochs * steps_per_epoch,
            hold=steps_per_epoch,
            eval_every=steps_per_epoch,
            interpolation="bilinear",
            last_only=False,
        )


def _most_blocks(backbone: nn.Module) -> int:
    """Number of blocks whose class tokens can be joined: four, or all if there are fewer."""
    return min(LAST_BLOCKS, int(backbone.depth)) if is_vit(backbone) else 1  # type: ignore[arg-type]  # an int


def check_positive(**numbers: int) -> None:
    """Refuse numbers below 1, by name."""
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name}: need a whole number above 0, got {number}")
