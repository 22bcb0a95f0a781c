"""Linear classification of frozen features, by the protocols of DINOv2 and of DINO v1.

`GridProtocol` trains classifiers of four inputs at thirteen learning rates each on one frozen
forward; `DinoProtocol` trains one classifier. Both report the best accuracy on the test set, as
published: the number was chosen on the images that it is measured on, and the report says so.

Shape letter: N images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dinoscale.convert.weights import Network
from dinoscale.data.labelled_crops import FLIP_PROB, SCALE, stream_sampler
from dinoscale.errors import ConfigError, NonFiniteError
from dinoscale.evaluate.accuracy import choose_best, percent
from dinoscale.evaluate.frozen import Extraction
from dinoscale.evaluate.linear_heads import (
    INIT_STD,
    MOMENTUM,
    FeatureKind,
    LinearHeads,
    TokenFeatures,
    is_vit,
)
from dinoscale.evaluate.linear_protocols import DinoProtocol, GridProtocol, ProbePlan
from dinoscale.evaluate.probe_report import Log, preprocessing, report_of
from dinoscale.evaluate.subject import (
    READING,
    Reading,
    Subject,
    open_subject,
    outputs_of_test,
    outputs_of_train,
    train_images,
)


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
    network: Network = "teacher",
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
        network: which of the two of a run or a full checkpoint.
        num_heads: for reference checkpoints whose attention heads are not 64 channels wide.

    Returns:
        The report, ready for JSON: `score` is of the best classifier, `chosen` says which that is
        and that it was chosen on the test set, `evaluations` holds all that was measured.

    Raises:
        CheckpointError: the weights file cannot be used.
        ConfigError: a setting is out of range.
        DataError: a set cannot be read or lacks labels, the classes differ, or there is only one.
        NonFiniteError: a feature is not a finite number, or every classifier has diverged.
    """
    if seed < 0:
        raise ConfigError(f"seed: need 0 or more, got {seed}")
    how = Extraction(network=network, num_heads=num_heads, device=device)
    subject = open_subject(weights_path, train_spec, test_spec, how)
    plan = protocol.plan(subject.backbone, images=len(subject.train))

    def measure(backbone: nn.Module, log: Log) -> dict[str, object]:
        evaluations = []
        probe = _Probe(backbone, subject, plan, reading, augment=augment, seed=seed)
        for evaluation in probe.evaluations():
            log(evaluation)
            evaluations.append(evaluation)
        return _chosen(evaluations, plan) | {"evaluations": evaluations}

    return report_of(
        "linear",
        subject,
        measure,
        protocol={"network": network}
        | _protocol(protocol, plan, subject, augment=augment, seed=seed),
        untrained=untrained,
        log_path=log_path,
    )


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
        tests, test_labels = outputs_of_test(
            self._tokens, self._subject, self._reading, taken=self._tokens.taken
        )
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
        features, labels = outputs_of_train(
            self._tokens, subject, reading, taken=self._tokens.taken
        )
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
            every = zip(self._plan.rates, counts, heads.finite(), strict=True)
            for rate, (top1, top5), finite in every:
                score = percent(top1, top5, images=len(labels), num_classes=classes)
                found = {"blocks": kind.blocks, "pooled": kind.pooled, "lr": rate} | score
                results.append(found | ({} if finite else {"diverged": True}))
        if all("diverged" in result for result in results):
            raise NonFiniteError(
                f"step {done}: the weights of all classifiers are no longer finite numbers; lower"
                " the learning rate"
            )
        epoch = {} if self._plan.last_only else {"epoch": done // self._plan.hold}
        return {"step": done, **epoch, "classifiers": results}


def _chosen(evaluations: list[Evaluation], plan: ProbePlan) -> dict[str, object]:
    """The best classifier, looked for where the protocol does."""
    entries = [
        {key: evaluation[key] for key in ("step", "epoch") if key in evaluation} | classifier
        for evaluation in (evaluations[-1:] if plan.last_only else evaluations)
        for classifier in evaluation["classifiers"]  # type: ignore[attr-defined]  # a list
        if "diverged" not in classifier
    ]
    return choose_best(entries, with_last=not plan.last_only)


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
