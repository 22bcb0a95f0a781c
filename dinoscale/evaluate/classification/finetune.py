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

from dinoscale.convert.weights_file import save_backbone
from dinoscale.data.augmentation.labelled_crops import FLIP_PROB, SCALE
from dinoscale.engine.param_groups import DECAY, build_optimizer
from dinoscale.engine.schedules import cosine
from dinoscale.errors import ConfigError, NonFiniteError
from dinoscale.evaluate.classification.accuracy import answers, choose_best, num_correct, percent
from dinoscale.evaluate.classification.answers import NO_DETAILS, Details
from dinoscale.evaluate.classification.inputs import (
    ClassifierInputs,
    DrawnImages,
    extract_test_features,
    open_inputs,
    train_images,
)
from dinoscale.evaluate.classification.kept_probe import ProbeCard
from dinoscale.evaluate.classification.linear_heads import INIT_STD
from dinoscale.evaluate.classification.probe_report import Reporting
from dinoscale.evaluate.classification.resumable_training import (
    Best,
    State,
    check_target,
    head_beside,
    save_tensors,
    train_and_report,
    weights_files,
)
from dinoscale.evaluate.frozen_backbone import DEFAULT_EXTRACTION, ExtractionOptions
from dinoscale.evaluate.progress import bar_options
from dinoscale.models.stochastic_depth import stochastic_depth_keep

BATCH_SCALE = 512  # batch size for which the rate is stated, as in DeiT's code
WARMUP = 5 / 300  # share of the steps: 5 of the published 300 epochs

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; all defaults but the epochs are the published ones.

    Attributes:
        epochs: passes over the train set, each followed by a measurement; 300 in the paper.
        batch_size: images of a step; the rate is multiplied by batch_size / 512.
        lr: learning rate for 512 images.
        weight_decay: of AdamW; biases and norms have none.
        label_smoothing: share of the target that is spread over all classes.
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
    details: Details = NO_DETAILS,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Train a backbone and a classifier on one labelled set, and test them on another.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        train_spec: labelled images, as `data.train` of a config.
        test_spec: labelled images of the same classes.
        recipe: how to train.
        seed: of the classifier, the order of images, their crops and stochastic depth, >= 0.
        untrained: also train the same architecture from fresh weights.
        out: weights file for the backbone of the last epoch, with `NAME-head` beside it for the
            classifier (see `kept_probe`); `NAME-best`, `NAME-best-head` are of the best epoch. All
            are written after each epoch, with the state of the training, from which the same call
            resumes to the same numbers. None writes nothing.
        log_path: JSON lines, one for each epoch as soon as it is done.
        details: what to say of the answers for single images.
        options: which network, which device, and how test images are read.

    Returns:
        The report, ready for JSON: `score` has the best epoch on the test set and the last one,
        `chosen` names the best, `evaluations` holds all epochs.

    Raises:
        CheckpointError: the weights file or the saved state of the training cannot be used.
        ConfigError: a setting is out of range, a file cannot be written, or the state beside `out`
            belongs to another training.
        DataError: a set cannot be read or lacks labels, the classes differ, or there is only one.
        NonFiniteError: the training diverged.
    """
    recipe.check()
    details.check()
    if seed < 0:
        raise ConfigError(f"seed: need 0 or more, got {seed}")
    target = check_target(out, weights_path, with_heads=True)
    inputs = open_inputs(weights_path, train_spec, test_spec, options)
    if recipe.precision is None:
        recipe = replace(recipe, precision="bf16" if inputs.device.type == "cuda" else "fp32")
    return train_and_report(
        "finetune",
        inputs,
        lambda backbone: _FineTuning(backbone, inputs, recipe, seed),
        protocol={"network": options.network} | _protocol(recipe, inputs, seed=seed),
        out=target,
        reporting=Reporting(untrained, log_path, details),
    )


class _FineTuning:
    """The training of one backbone, in place."""

    def __init__(
        self, backbone: nn.Module, inputs: ClassifierInputs, recipe: Recipe, seed: int
    ) -> None:
        backbone.requires_grad_(requires_grad=True)
        network = Classifier(backbone, num_classes=inputs.num_classes, seed=seed)
        self._network = network.to(inputs.device)
        self._optimizer = build_optimizer("adamw", self._network)
        self._inputs, self._recipe, self._seed = inputs, recipe, seed
        self._depth_generator = torch.Generator().manual_seed(seed)  # of stochastic depth
        self._drawn = DrawnImages(len(inputs.train))
        self._best = Best()
        self._steps_per_epoch = math.ceil(len(inputs.train) / recipe.batch_size)
        self._total_steps = recipe.epochs * self._steps_per_epoch

    def extract(self) -> None:
        """Nothing: the features change with every step."""

    def measured(self, state: State | None) -> Iterator[tuple[dict[str, float], State]]:
        """Train, and yield the results and the state after each epoch.

        Args:
            state: that was yielded after an epoch, to resume after it; None begins.

        Yields:
            `epoch` from 1, mean `loss` of its steps in nats, `top1` and, of more than five
            classes, `top5` on the test set, in percent; and the state of the training, which
            changes with it.

        Raises:
            NonFiniteError: the loss or an output is not a finite number.
        """
        first = 0 if state is None else self._load(state)
        total = torch.zeros((), device=self._inputs.device)
        self._network.train()
        for step, (pixels, labels) in enumerate(self._batches(first), start=first):
            total += self._step(step, pixels, labels)
            epoch, left = divmod(step + 1, self._steps_per_epoch)
            if not left:
                mean = _finite(total.item() / self._steps_per_epoch)
                total.zero_()
                yield {"epoch": epoch, "loss": mean, **self._test()}, self._state(step + 1)
        if first == self._total_steps:  # only the report is missing
            self._test()
        self._inputs.used["train"] = self._drawn.used(self._inputs.train)

    def save(self, evaluations: Sequence[Mapping[str, float]], out: Path) -> None:
        """Write the current backbone and classifier as the last, and as the best if they are."""
        card = self._inputs.card
        card = replace(card, source=f"{card.source}, fine-tuned")
        head, backbone = self._network.head, self._network.backbone
        try:
            for target in weights_files(out, [evaluation["top1"] for evaluation in evaluations]):
                save_backbone(target, backbone.state_dict(), card)
                tensors = {"weight": head.weight, "bias": head.bias}
                about = self._card(evaluations[-1]).metadata()
                save_tensors(head_beside(target), tensors, about)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"out: {out} cannot be written ({error})") from error

    def _card(self, measured: Mapping[str, float]) -> ProbeCard:
        precision = self._recipe.precision
        assert precision is not None  # `evaluate_finetune` has chosen
        inputs, backbone = self._inputs, self._network.backbone
        of = (inputs.extractor, backbone, inputs.train)
        training = inputs.training(_protocol(self._recipe, inputs, seed=self._seed))
        return ProbeCard.of(
            "finetune", *of, measured=measured, training=training, precision=precision
        )

    def chosen(self, evaluations: Sequence[dict[str, float]]) -> dict[str, object]:
        """The best epoch on the test set, and the last."""
        return choose_best(evaluations, with_last=True) | {"answers": self._best.answers}

    def _load(self, state: State) -> int:
        """Restore the training; returns the first step that is left."""
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._depth_generator.set_state(state["noise"].cpu())
        self._drawn = DrawnImages.of(state["drawn"])
        self._best = Best.of(state["best"])
        return int(state["step"])

    def _state(self, done: int) -> State:
        now: State = {
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        now |= {"noise": self._depth_generator.get_state(), "drawn": self._drawn.state()}
        return now | {"step": done, "best": self._best.state()}

    def _batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images and labels of each step from the first on, with a progress bar."""
        options = self._inputs.extractor.options
        images = train_images(
            self._inputs,
            interpolation="bicubic",
            batch_size=self._recipe.batch_size,
            steps=self._total_steps,
            first_step=first,
            seed=self._seed,
            num_workers=options.num_workers,
            drawn=self._drawn,
        )
        shown = bar_options(shown=options.progress)
        yield from tqdm(images, initial=first, total=self._total_steps, unit="step", **shown)

    def _step(self, step: int, pixels: Tensor, labels: Tensor) -> Tensor:
        """Take one optimizer step; returns its loss."""
        recipe = self._recipe
        keep = self._keep(len(labels))
        with _autocast(self._inputs.device, recipe):
            logits = self._network([pixels], None if keep is None else keep.to(pixels.device))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        self._optimizer.zero_grad()
        loss.backward()
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.rate(step, total_steps=self._total_steps)
            group["weight_decay"] = recipe.weight_decay if group["name"] == DECAY else 0.0
        self._optimizer.step()
        return loss.detach()

    def _keep(self, images: int) -> Tensor | None:
        """Multipliers of stochastic depth (depth, 2, N); None where there are no such blocks."""
        depth = int(self._network.backbone.depth)  # type: ignore[arg-type]  # an int
        rate = self._recipe.drop_path_rate
        if not depth or not rate:
            return None
        uniform = torch.rand(depth, 2, images, generator=self._depth_generator)
        return stochastic_depth_keep(uniform, rate)

    def _test(self) -> dict[str, float]:
        inputs = self._inputs
        with _autocast(inputs.device, self._recipe):
            logits, labels = extract_test_features(
                self._network, inputs, output_key=None, progress=False
            )
        top1, top5 = num_correct(logits, labels)
        classes = inputs.num_classes
        found = percent(int(top1), int(top5), images=len(labels), num_classes=classes)
        self._best.offer(found["top1"], lambda: answers(logits))
        return found


class Classifier(nn.Module):
    """A backbone and a linear layer on its output; takes crops as the backbone does.

    Attributes:
        embed_dim: C, width of the output.
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


def _autocast(device: torch.device, recipe: Recipe) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise NonFiniteError("the loss is not a finite number; lower the learning rate")
    return loss


def _protocol(recipe: Recipe, inputs: ClassifierInputs, *, seed: int) -> dict[str, object]:
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
        "test_images": inputs.extractor.preparation,
        "chosen": "the best on the test set, of all epochs",
    }
