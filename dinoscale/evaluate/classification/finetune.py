"""Short supervised fine-tuning of a whole backbone with a linear classifier, in one process.

Shape letters: N images, C classes, D width.
Source: the settings published for DINO v1's transfer (Caron et al. 2021, arXiv:2104.14294)
in the manner of Touvron et al. 2021 (arXiv:2012.12877). Differs: of their augmentation only random
crops and mirroring; no RandAugment, mixup, cutmix, erasing or repeated augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dinoscale.convert.weights import Network
from dinoscale.convert.weights_file import save_backbone
from dinoscale.data.augmentation.labelled_crops import FLIP_PROB, SCALE
from dinoscale.engine.param_groups import DECAY, build_optimizer
from dinoscale.engine.schedules import cosine
from dinoscale.errors import ConfigError, NonFiniteError
from dinoscale.evaluate.classification.accuracy import choose_best, num_right, percent
from dinoscale.evaluate.classification.inputs import (
    READING,
    Drawn,
    Reading,
    Subject,
    open_subject,
    outputs_of_test,
    train_images,
)
from dinoscale.evaluate.classification.linear_heads import INIT_STD
from dinoscale.evaluate.classification.probe_report import preprocessing
from dinoscale.evaluate.classification.resumable_training import (
    State,
    report_of_training,
    targets_of,
    writable,
)
from dinoscale.evaluate.frozen_backbone import Extraction
from dinoscale.models.stochastic_depth import stochastic_depth_keep

BATCH_SCALE = 512  # images of a batch that the rate is stated for, as in DeiT's code
WARMUP = 5 / 300  # share of the steps: 5 of the published 300 epochs

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; the published numbers, but for the epochs.

    Attributes:
        epochs: passes over the train set, each followed by a measurement; 300 in the paper.
        batch_size: images of a step; the rate is multiplied by batch_size / 512.
        lr: learning rate for 512 images.
        weight_decay: of AdamW; biases and norms have none.
        label_smoothing: share of the target that all classes have in common.
        drop_path_rate: of the last block; grows linearly from 0.
        precision: of matrix products; weights stay in float32. None is bf16 on a GPU, else fp32.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 5e-5
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    drop_path_rate: float = 0.1
    precision: Precision | None = None

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ConfigError: one is.
        """
        if self.epochs < 1 or self.batch_size < 1:
            sizes = f"{self.epochs} and {self.batch_size}"
            raise ConfigError(f"need epochs > 0 and batch_size > 0, got {sizes}")
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            rates = f"{self.lr} and {self.weight_decay}"
            raise ConfigError(f"need lr > 0 and weight_decay >= 0, got {rates}")
        if not (0 <= self.label_smoothing < 1 and 0 <= self.drop_path_rate < 1):
            shares = f"{self.label_smoothing} and {self.drop_path_rate}"
            raise ConfigError(f"need 0 <= label_smoothing, drop_path_rate < 1; got {shares}")

    def rate(self, step: int, *, total_steps: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine towards 0."""
        return cosine(
            step,
            base=self.lr * self.batch_size / BATCH_SCALE,
            final=0.0,
            total_steps=total_steps,
            warmup_steps=round(WARMUP * total_steps),
        )


def evaluate_finetune(
    weights_path: str | Path,
    train_spec: str,
    test_spec: str,
    *,
    recipe: Recipe = Recipe(),
    seed: int = 0,
    untrained: bool = False,
    out: str | Path | None = None,
    log_path: str | Path | None = None,
    reading: Reading = READING,
    device: str | None = None,
    network: Network = "teacher",
    num_heads: int | None = None,
) -> dict[str, object]:
    """Train a backbone and a classifier on one labelled set, and measure them on another.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        train_spec: labelled images, as `data.train` of a config.
        test_spec: labelled images of the same classes.
        recipe: how to train.
        seed: of the classifier, the order of images, their crops and stochastic depth, >= 0.
        untrained: also train the same architecture from fresh weights.
        out: weights file for the backbone of the last epoch, beside it `NAME-best` for that of the
            best, both written after each epoch, and the state of the training until it is reported:
            the same call goes on with it, to the same numbers. None writes nothing.
        log_path: JSON lines, one for each epoch as soon as it is done.
        reading: batches of the test, workers and bars.
        device: a torch device; None takes the accelerator if there is one.
        network: which of the two of a run or a full checkpoint.
        num_heads: for reference checkpoints whose attention heads are not 64 channels wide.

    Returns:
        The report, ready for JSON: `score` has the best epoch on the test set and the last one,
        `chosen` says which that is, `evaluations` holds all epochs.

    Raises:
        CheckpointError: the weights file cannot be used, or what is kept of the training.
        ConfigError: a setting is out of range, a file cannot be written, or another training is
            kept beside `out`.
        DataError: a set cannot be read or lacks labels, the classes differ, or there is only one.
        NonFiniteError: the training diverged.
    """
    recipe.check()
    if seed < 0:
        raise ConfigError(f"seed: need 0 or more, got {seed}")
    target = writable(out, weights_path)
    how = Extraction(network=network, num_heads=num_heads, device=device)
    subject = open_subject(weights_path, train_spec, test_spec, how)
    if recipe.precision is None:
        recipe = replace(recipe, precision="bf16" if subject.device.type == "cuda" else "fp32")

    return report_of_training(
        "finetune",
        subject,
        lambda backbone: _FineTuning(backbone, subject, recipe, reading, seed),
        protocol={"network": network} | _protocol(recipe, subject, seed=seed),
        out=target,
        untrained=untrained,
        log_path=log_path,
    )


@dataclass(frozen=True)
class _FineTuning:
    """The training of one backbone, in place."""

    backbone: nn.Module
    subject: Subject
    recipe: Recipe
    reading: Reading
    seed: int

    def measured(self, state: State | None) -> Iterator[tuple[dict[str, float], State]]:
        """Train, and yield what `fine_tune` does."""
        how = (self.recipe, self.reading)
        return fine_tune(self.backbone, self.subject, *how, state, seed=self.seed)

    def save(self, evaluations: Sequence[Mapping[str, float]], out: Path) -> None:
        """Write the backbone as the last one, and where it is as the best."""
        card = self.subject.card
        card = replace(card, source=f"{card.source}, fine-tuned")
        try:
            for target in targets_of(out, [evaluation["top1"] for evaluation in evaluations]):
                save_backbone(target, self.backbone.state_dict(), card)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"out: {out} cannot be written ({error})") from error

    def chosen(self, evaluations: Sequence[dict[str, float]]) -> dict[str, object]:
        """The best epoch on the test set, and the last."""
        return choose_best(evaluations, with_last=True)


class Classifier(nn.Module):
    """A backbone and a linear layer on its output; takes crops as the backbone does.

    Attributes:
        embed_dim: C, width of what comes out.
    """

    def __init__(self, backbone: nn.Module, *, num_classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.embed_dim = num_classes
        self.head = nn.Linear(int(backbone.embed_dim), num_classes)  # type: ignore[arg-type]  # an int
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.head.weight, std=INIT_STD, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, crops: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """Return logits (N, C); `keep` as the backbone's."""
        logits: Tensor = self.head(self.backbone(crops, keep))
        return logits


def fine_tune(
    backbone: nn.Module,
    subject: Subject,
    recipe: Recipe,
    reading: Reading,
    state: State | None = None,
    *,
    seed: int,
) -> Iterator[tuple[dict[str, float], State]]:
    """Train the backbone in place, and yield what is known after each epoch.

    Args:
        backbone: at its beginning.
        subject: what it learns from.
        recipe: how.
        reading: how test images are read.
        state: that was yielded after an epoch, to go on after it; None begins.
        seed: of all random numbers.

    Yields:
        `epoch` from 1, mean `loss` of its steps in nats, `top1` and, of more than five classes,
        `top5` on the test set, in percent; and the state of the training, which changes with it.

    Raises:
        NonFiniteError: the loss or an output is not a finite number.
    """
    backbone.requires_grad_(requires_grad=True)
    network = Classifier(backbone, num_classes=subject.num_classes, seed=seed).to(subject.device)
    optimizer = build_optimizer("adamw", network)
    steps_per_epoch = math.ceil(len(subject.train) / recipe.batch_size)
    total_steps = recipe.epochs * steps_per_epoch
    noise = torch.Generator().manual_seed(seed)
    drawn, first = Drawn(len(subject.train)), 0
    if state is not None:
        first = state["step"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        noise.set_state(state["noise"].cpu())
        drawn = Drawn.of(state["drawn"])
    images = train_images(
        subject,
        interpolation="bicubic",
        batch_size=recipe.batch_size,
        steps=total_steps,
        first_step=first,
        seed=seed,
        num_workers=reading.num_workers,
        drawn=drawn,
    )
    total = torch.zeros((), device=subject.device)
    network.train()
    shown = None if reading.progress else True
    bar = tqdm(images, initial=first, total=total_steps, unit="step", disable=shown)
    for step, (pixels, labels) in enumerate(bar, start=first):
        keep = _keep(backbone, len(labels), recipe.drop_path_rate, noise)
        with _autocast(subject.device, recipe):
            logits = network([pixels], None if keep is None else keep.to(subject.device))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, total_steps=total_steps)
            group["weight_decay"] = recipe.weight_decay if group["name"] == DECAY else 0.0
        optimizer.step()
        total += loss.detach()
        epoch, left = divmod(step + 1, steps_per_epoch)
        if not left:
            mean = _finite(total.item() / steps_per_epoch)
            total.zero_()
            found = {"epoch": epoch, "loss": mean, **_test(network, subject, recipe, reading)}
            now: State = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            now |= {"noise": noise.get_state(), "drawn": drawn.state(), "step": step + 1}
            yield found, now
    if first == total_steps:  # only the report is missing
        _test(network, subject, recipe, reading)
    subject.used["train"] = drawn.used(subject.train)


def _keep(backbone: nn.Module, images: int, rate: float, noise: torch.Generator) -> Tensor | None:
    """Multipliers of stochastic depth (depth, 2, N); None where there are no such blocks."""
    depth = int(backbone.depth)  # type: ignore[arg-type]  # an int of all of ours
    if not depth or not rate:
        return None
    return stochastic_depth_keep(torch.rand(depth, 2, images, generator=noise), rate)


def _autocast(device: torch.device, recipe: Recipe) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NonFiniteError("the loss is not a finite number; lower the learning rate")
    return loss


def _test(
    network: Classifier, subject: Subject, recipe: Recipe, reading: Reading
) -> dict[str, float]:
    with _autocast(subject.device, recipe):
        logits, labels = outputs_of_test(
            network, subject, replace(reading, progress=False), taken=None
        )
    top1, top5 = num_right(logits, labels)
    classes = subject.num_classes
    return percent(int(top1), int(top5), images=len(labels), num_classes=classes)


def _protocol(recipe: Recipe, subject: Subject, *, seed: int) -> dict[str, object]:
    crops = {"scale": list(SCALE), "flip_prob": FLIP_PROB, "interpolation": "bicubic"}
    return {
        "method": "fine-tuning of backbone and linear classifier",
        **asdict(recipe),
        "features": "backbone output (of a ViT: normalised CLS token)",
        "optimizer": "adamw, betas 0.9 and 0.999",
        "lr_schedule": "linear warm-up, cosine to 0, by step",
        "peak_lr": recipe.lr * recipe.batch_size / BATCH_SCALE,
        "warmup_share": WARMUP,
        "seed": seed,
        "train_images": crops,
        "test_images": preprocessing(subject.card),
        "chosen": "the best on the test set, of all epochs",
    }
