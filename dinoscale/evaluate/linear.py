"""Linear classification of frozen features, by the protocols of DINOv2 and of DINO v1.

`GridProtocol` trains classifiers of four inputs at thirteen learning rates each on one frozen
forward; `DinoProtocol` trains one classifier. Both report the best accuracy on the test set, as
published: the number was chosen on the images that it is measured on, and the report says so.

Shape letters: N images, G classifiers of one input.
Sources: Oquab et al. 2023 (arXiv:2304.07193), appendix B.3, and Caron et al. 2021
(arXiv:2104.14294), section 4.1, with the numbers of their published evaluation code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dinoscale.data.augment import Interpolation
from dinoscale.data.labelled_crops import FLIP_PROB, SCALE, stream_sampler
from dinoscale.errors import ConfigError
from dinoscale.evaluate.labelled import (
    READING,
    Reading,
    ResultLog,
    Subject,
    describe,
    open_subject,
    outputs_of_test,
    outputs_of_train,
    percent,
    preprocessing,
    train_images,
    untrained_backbone,
)
from dinoscale.evaluate.linear_heads import (
    INIT_STD,
    MOMENTUM,
    FeatureKind,
    LinearHeads,
    TokenFeatures,
    is_vit,
)
from dinoscale.schedules import cosine

LAST_BLOCKS = 4  # class tokens that the wide inputs of both protocols join
POOLED_FROM = 768  # width of ViT-B, from which v1 takes one class token and the mean patch token
BATCH_SCALE = 256  # images of a batch that the rates are stated for
GRID_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@dataclass(frozen=True)
class ProbePlan:
    """What is trained on which input, how long, and when it is measured.

    Attributes:
        kinds: inputs, each with a classifier for every rate.
        rates: learning rates, already scaled by the batch.
        blocks: class tokens of so many last blocks are needed.
        batch_size: images of a step.
        steps: in all.
        hold: steps with one rate; the cosine falls after each `hold` of them.
        eval_every: steps between two measurements; there is one after the last step, too.
        interpolation: of the training crops.
        last_only: the best classifier is looked for after the last step; else after each epoch.
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
        """Share of its rate that every classifier learns with: half a cosine from 1 towards 0."""
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
        """Lay it out for a backbone; a train set of any number of images is repeated."""
        _check_positive(iterations=self.iterations, batch_size=self.batch_size, images=images)
        _check_positive(eval_every=self.eval_every)
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

    Differs: an epoch is the least number of full batches that hold as many images as the set; the
    reference ends each epoch with a smaller batch.

    Attributes:
        epochs: passes over the train set, each followed by a measurement.
        batch_size: images of a step; the rate is multiplied by batch_size / 256.
        lr: learning rate for 256 images; the paper sweeps it for each model.
    """

    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.001

    def plan(self, backbone: nn.Module, *, images: int) -> ProbePlan:
        """Lay it out for a backbone and a train set."""
        _check_positive(epochs=self.epochs, batch_size=self.batch_size, images=images)
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
    """Blocks whose class tokens can be joined: four, or as many as there are."""
    return min(LAST_BLOCKS, int(backbone.depth)) if is_vit(backbone) else 1  # type: ignore[arg-type]  # an int


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name}: need a whole number above 0, got {number}")


def evaluate_linear(
    weights_path: str | Path,
    train_spec: str,
    test_spec: str,
    *,
    protocol: GridProtocol | DinoProtocol,
    augment: bool = True,
    seed: int = 0,
    untrained: bool = False,
    log_path: str | Path | None = None,
    reading: Reading = READING,
    device: str | None = None,
    num_heads: int | None = None,
) -> dict[str, object]:
    """Train linear classifiers on frozen features of one set, and measure them on another.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        train_spec: labelled images, as `data.train` of a config.
        test_spec: labelled images of the same classes.
        protocol: what to train, with its published numbers as defaults.
        augment: train on random crops, forwarded anew in each step; without, on features of the
            whole images as tests see them, which are forwarded once: fast, and not as published.
        seed: of the first weights, the order of images and their crops, >= 0.
        untrained: also measure the same architecture with fresh weights.
        log_path: JSON lines, one for each measurement as soon as it is known.
        reading: batches, workers and bars.
        device: a torch device; None takes the accelerator if there is one.
        num_heads: for reference checkpoints whose attention heads are not 64 channels wide.

    Returns:
        The report, ready for JSON: `score` is of the best classifier, `chosen` says which that is
        and that it was chosen on the test set, `evaluations` holds all that was measured.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range.
        DataError: a set cannot be read or lacks labels, the classes differ, or there is only one.
        NonFiniteError: a feature is not a finite number.
    """
    if seed < 0:
        raise ConfigError(f"seed: need 0 or more, got {seed}")
    subject = open_subject(weights_path, train_spec, test_spec, device=device, num_heads=num_heads)
    plan = protocol.plan(subject.backbone, images=len(subject.train))
    log = ResultLog(log_path)
    networks = {"trained": subject.backbone}
    if untrained:
        networks["untrained"] = untrained_backbone(subject)
    report = describe("linear", subject) | {
        "protocol": _protocol(protocol, plan, subject, augment=augment, seed=seed)
    }
    for name, backbone in networks.items():
        head = {"task": "linear", "weights": subject.weights, "network": name}
        probe = _Probe(backbone, subject, plan, reading, augment=augment, seed=seed)
        evaluations = []
        for evaluation in probe.evaluations():
            log.add(head | evaluation)
            evaluations.append(evaluation)
        if name == "untrained":
            report["untrained"] = _chosen(evaluations, plan)["score"]
        else:
            report |= _chosen(evaluations, plan) | {"evaluations": evaluations}
    return report


Evaluation = dict[str, object]


class _Probe:
    """The classifiers of a plan on the features of one backbone."""

    def __init__(
        self,
        backbone: nn.Module,
        subject: Subject,
        plan: ProbePlan,
        reading: Reading,
        *,
        augment: bool,
        seed: int,
    ) -> None:
        self._subject, self._plan, self._reading = subject, plan, reading
        self._augment, self._seed = augment, seed
        self._tokens = TokenFeatures(backbone, blocks=plan.blocks)
        self._heads = [
            LinearHeads(
                num_heads=len(plan.rates),
                num_classes=subject.num_classes,
                width=self._tokens.token_dim * (kind.blocks + kind.pooled),
                seed=seed,
                device=subject.device,
            )
            for kind in plan.kinds
        ]

    def evaluations(self) -> Iterator[Evaluation]:
        """Train, and yield what is measured on the way and at the end."""
        plan = self._plan
        tests, test_labels = outputs_of_test(self._tokens, self._subject, self._reading)
        rates = torch.tensor(plan.rates, device=tests.device)
        shown = None if self._reading.progress else True
        bar = tqdm(self._batches(), total=plan.steps, unit="step", disable=shown)
        for step, (features, labels) in enumerate(bar):
            now = rates * plan.factor(step)
            for kind, heads in zip(plan.kinds, self._heads, strict=True):
                heads.step(self._take(kind, features), labels, now)
            done = step + 1
            if done % plan.eval_every == 0 or done == plan.steps:
                yield self._measure(tests, test_labels, done)

    def _take(self, kind: FeatureKind, features: Tensor) -> Tensor:
        return kind.take(features, stored=self._plan.blocks, token_dim=self._tokens.token_dim)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (N, ...) and labels (N,) of each step."""
        plan, subject, reading = self._plan, self._subject, self._reading
        if self._augment:
            images = train_images(
                subject,
                interpolation=plan.interpolation,
                batch_size=plan.batch_size,
                steps=plan.steps,
                seed=self._seed,
                num_workers=reading.num_workers,
            )
            for pixels, labels in images:
                with torch.no_grad():
                    yield self._tokens([pixels]).float(), labels
            return
        features, labels = outputs_of_train(self._tokens, subject, reading)
        sampler = stream_sampler(
            len(features), batch_size=plan.batch_size, steps=plan.steps, seed=self._seed
        )
        for step in range(plan.steps):
            ids = torch.from_numpy(sampler.step(step).ids).to(features.device)
            yield features[ids], labels[ids]

    def _measure(self, tests: Tensor, labels: Tensor, done: int) -> Evaluation:
        results = []
        classes = self._subject.num_classes
        for kind, heads in zip(self._plan.kinds, self._heads, strict=True):
            counts = heads.right(self._take(kind, tests), labels)
            for rate, (top1, top5) in zip(self._plan.rates, counts, strict=True):
                score = percent(top1, top5, images=len(labels), num_classes=classes)
                results.append({"blocks": kind.blocks, "pooled": kind.pooled, "lr": rate} | score)
        epoch = {} if self._plan.last_only else {"epoch": done // self._plan.hold}
        return {"step": done, **epoch, "classifiers": results}


def _chosen(evaluations: list[Evaluation], plan: ProbePlan) -> dict[str, object]:
    """The best classifier as the protocol chooses it; the first of equals."""
    entries = [
        {"step": evaluation["step"], **classifier}
        for evaluation in (evaluations[-1:] if plan.last_only else evaluations)
        for classifier in evaluation["classifiers"]  # type: ignore[attr-defined]  # a list
    ]
    best, last = max(entries, key=lambda entry: entry["top1"]), entries[-1]
    accuracies = ("top1", "top5") if "top5" in best else ("top1",)
    score = {name: best[name] for name in accuracies}
    if not plan.last_only:
        score |= {f"last_{name}": last[name] for name in accuracies}
    return {"score": score, "chosen": best | {"chosen_on": "test"}}


_CHOSEN_OF = {True: "all classifiers after the last step", False: "all epochs"}


def _protocol(
    protocol: GridProtocol | DinoProtocol,
    plan: ProbePlan,
    subject: Subject,
    *,
    augment: bool,
    seed: int,
) -> dict[str, object]:
    crops = {"scale": list(SCALE), "flip_prob": FLIP_PROB, "interpolation": plan.interpolation}
    return {
        "method": "grid" if isinstance(protocol, GridProtocol) else "dino",
        **asdict(protocol),
        "features": "class tokens of the last blocks, and the mean patch token where pooled, all"
        " through the final norm"
        if is_vit(subject.backbone)
        else "pooled backbone output",
        "inputs": [asdict(kind) for kind in plan.kinds],
        "rates": list(plan.rates),
        "optimizer": "sgd",
        "momentum": MOMENTUM,
        "weight_decay": 0.0,
        "init_std": INIT_STD,
        "lr_schedule": f"cosine to 0, lowered after every {plan.hold} steps",
        "steps": plan.steps,
        "seed": seed,
        "train_images": crops
        if augment
        else "as test images, without augmentation; forwarded once",
        "test_images": preprocessing(subject.card),
        "chosen": f"the best on the test set, of {_CHOSEN_OF[plan.last_only]}",
    }
