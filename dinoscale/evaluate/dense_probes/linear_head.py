"""A batch norm and a linear layer on frozen patch features, trained on crops, resumable.

Shape letters: N images of a batch, C channels, H, W pixels, R, S rows and columns of patches, D
channels of the features, K outputs.
Source: Oquab et al. 2023 (arXiv:2304.07193) and Simeoni et al. 2025 (arXiv:2508.10104), appendices
on semantic segmentation and depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dinoscale.data.seeding import Stream, generator
from dinoscale.data.transfer import to_device
from dinoscale.engine.schedules import cosine
from dinoscale.errors import ConfigError, NonFiniteError
from dinoscale.evaluate.classification.resumable_training import TrainingState
from dinoscale.evaluate.dense_probes.pair_crops import CropRule, PairCrops, pair_crops
from dinoscale.evaluate.dense_probes.pairs import Pairs, Reading
from dinoscale.evaluate.dense_probes.patch_maps import Maps
from dinoscale.evaluate.progress import bar_options

INIT_STD = 0.01  # of the weights of the linear layer, normal with mean 0; biases start at 0
SAVE_EVERY = 1000  # iterations between two saved states


@dataclass(frozen=True)
class Recipe:
    """How a head is trained: AdamW, linear warm-up, then half a cosine to 0.

    Attributes:
        iterations: optimizer steps.
        batch_size: crops of a step.
        lr: highest learning rate.
        weight_decay: of all weights.
        warmup: share of the iterations before `lr` is reached.
        clip: largest norm of the gradient; 0 does not clip.
        dropout: share of the channels of an image that the linear layer does not see.
    """

    iterations: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    clip: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.iterations, self.batch_size) < 1:
            numbers = f"{self.iterations} and {self.batch_size}"
            raise ConfigError(f"need iterations > 0 and batch_size > 0, got {numbers}")
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            rates = f"{self.lr} and {self.weight_decay}"
            raise ConfigError(f"need lr > 0 and weight_decay >= 0, got {rates}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"need 0 <= dropout < 1, got {self.dropout}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return cosine(
            step,
            base=self.lr,
            final=0.0,
            total_steps=self.iterations,
            warmup_steps=int(self.warmup * self.iterations),
        )

    @classmethod
    def of(cls, protocol: Mapping[str, Any]) -> Recipe:
        """That of which `protocol` has said all; KeyError or TypeError if it has not."""
        return cls(**{field.name: protocol[field.name] for field in fields(cls)})

    def kept(self, images: int, channels: int, *, seed: int, step: int) -> Tensor | None:
        """Factors of the channels of a step (N, D, 1, 1), 0 or 1 / (1 - dropout); None drops none.

        They are a function of seed and step.
        """
        if not self.dropout:
            return None
        drawn = generator(seed, Stream.DROPOUT, step).random((images, channels, 1, 1))
        return torch.from_numpy(drawn >= self.dropout).float() / (1 - self.dropout)

    def protocol(self) -> dict[str, object]:
        """All that changes a number, ready for JSON."""
        return {
            **asdict(self),
            "optimizer": "AdamW",
            "lr_schedule": "linear warm-up, then half a cosine to 0",
            "init_std": INIT_STD,
        }


class LinearHead(nn.Module):
    """Batch norm and a 1 x 1 convolution: (N, D, R, S) to (N, K, R, S)."""

    def __init__(self, width: int, outputs: int, *, seed: int) -> None:
        """D = `width`, K = `outputs`; `seed` draws the weights."""
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Conv2d(width, outputs, kernel_size=1)
        drawn = torch.randn(self.linear.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.linear.weight.copy_(INIT_STD * drawn)
            self.linear.bias.zero_()  # type: ignore[union-attr]  # it has one

    def forward(self, features: Tensor, kept: Tensor | None = None) -> Tensor:
        """As of the class; `kept` of `Recipe.kept` multiplies what the convolution sees."""
        normed = self.norm(features)
        seen = normed if kept is None else normed * kept
        return self.linear(seen)  # type: ignore[no-any-return]  # nn.Module calls


# Takes the outputs of the head (N, K, R, S) and the targets (N, H, W), returns a scalar.
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeadTraining:
    """The training of a head on a set, but for the features.

    Attributes:
        pairs: the set.
        crops: how its crops are drawn.
        fill: target outside of an image.
        recipe: of the optimizer.
        loss: what is minimised.
        reading: how images are read.
        seed: of weights, order, crops and dropout, >= 0.
    """

    pairs: Pairs
    crops: CropRule
    fill: float
    recipe: Recipe
    loss: Loss
    reading: Reading
    seed: int

    def train(self, head: LinearHead, maps: Maps, saved: TrainingState) -> None:
        """Train a head on its device, from a saved state if there is one; then it is in eval mode.

        Raises:
            CheckpointError: the saved state is damaged.
            ConfigError: it belongs to another training, or cannot be written.
            NonFiniteError: the training diverged.
        """
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        state, first = saved.load(self.reading.device), 0
        if state is not None:
            first = state["step"]
            head.load_state_dict(state["head"])
            optimizer.load_state_dict(state["optimizer"])
        head.train()
        for step, crops in enumerate(self._batches(first), start=first):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            loss = self._loss(head, maps, crops, step)
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip:
                nn.utils.clip_grad_norm_(head.parameters(), recipe.clip)
            optimizer.step()
            done = step + 1
            if done % SAVE_EVERY == 0 or done == recipe.iterations:
                _require_finite(head, loss, done)
                now = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
                saved.save({"step": done, **now})
        head.eval()

    def _batches(self, first: int) -> Iterator[PairCrops]:
        recipe = self.recipe
        batches = pair_crops(
            self.pairs,
            self.crops,
            fill=self.fill,
            batch_size=recipe.batch_size,
            steps=recipe.iterations,
            first_step=first,
            seed=self.seed,
            num_workers=self.reading.num_workers,
        )
        bar = bar_options(shown=self.reading.progress)
        return iter(tqdm(batches, initial=first, total=recipe.iterations, unit="step", **bar))

    def _loss(self, head: LinearHead, maps: Maps, crops: PairCrops, step: int) -> Tensor:
        device = self.reading.device
        images = self.reading.normalized(crops.images)
        inside = to_device(crops.inside, device)[:, None]
        images = images * inside  # outside of an image: the mean color
        features = maps(images)
        kept = self.recipe.kept(*features.shape[:2], seed=self.seed, step=step)
        outputs = head(features, None if kept is None else to_device(kept, device))
        return self.loss(outputs, to_device(crops.targets, device))


def _require_finite(head: LinearHead, loss: Tensor, done: int) -> None:
    finite = all(bool(weight.isfinite().all()) for weight in head.state_dict().values())
    if not (finite and math.isfinite(float(loss.detach()))):
        raise NonFiniteError(f"step {done}: the head has diverged; lower the learning rate")
