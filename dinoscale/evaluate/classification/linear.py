"""Linear classification of frozen features, by the protocols of DINOv2 and of DINO v1.

`GridProtocol` trains classifiers of four inputs at thirteen learning rates each on one frozen
forward; `DinoProtocol` trains one classifier. Both report the best accuracy on the test set, as
published: it was chosen on the images that it is measured on, and the report says so.

Shape letter: N images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dinoscale.data.augmentation.labelled_crops import FLIP_PROB, SCALE, endless_sampler
from dinoscale.errors import ConfigError, NonFiniteError
from dinoscale.evaluate.classification.accuracy import choose_best, percent
from dinoscale.evaluate.classification.answers import NO_DETAILS, Details
from dinoscale.evaluate.classification.inputs import (
    ClassifierInputs,
    DrawnImages,
    extract_test_features,
    extract_train_features,
    open_inputs,
    train_images,
)
from dinoscale.evaluate.classification.kept_probe import ProbeCard
from dinoscale.evaluate.classification.linear_heads import (
    INIT_STD,
    MOMENTUM,
    FeatureKind,
    LinearHeads,
    TokenFeatures,
    is_vit,
)
from dinoscale.evaluate.classification.linear_protocols import DinoProtocol, GridProtocol, ProbePlan
from dinoscale.evaluate.classification.probe_report import Reporting
from dinoscale.evaluate.classification.resumable_training import (
    Best,
    State,
    check_target,
    save_tensors,
    train_and_report,
    weights_files,
)
from dinoscale.evaluate.frozen_backbone import DEFAULT_EXTRACTION, ExtractionOptions
from dinoscale.evaluate.progress import bar_options
from dinoscale.runtime import distributed


def evaluate_linear(
    weights_path: str | Path,
    train_spec: str,
    test_spec: str,
    *,
    protocol: GridProtocol | DinoProtocol,
    augment: bool = True,
    seed: int = 0,
    untrained: bool = False,
    out: str | Path | None = None,
    log_path: str | Path | None = None,
    details: Details = NO_DETAILS,
    options: ExtractionOptions = DEFAULT_EXTRACTION,
) -> dict[str, object]:
    """Train linear classifiers on frozen features of one set, and test them on another.

    Args:
        weights_path: any weights file that `load_backbone` reads.
        train_spec: labelled images, as `data.train` of a config.
        test_spec: labelled images of the same classes.
        protocol: what to train, with its published numbers as defaults.
        augment: train on random crops, as published, with a forward in each step. Otherwise train
            on features of whole images, prepared as test images and forwarded once: faster.
        seed: of the first weights, the order of images and their crops, >= 0.
        untrained: also measure the same architecture with fresh weights.
        out: safetensors file for the best classifier of the last measurement, see `kept_probe`;
            `NAME-best` beside it is for the best of all. Both are written after each, with the
            state of the training, from which the same call resumes to the same numbers. None writes
            nothing.
        log_path: JSON lines, one for each measurement as soon as it is done.
        details: what to say of the answers for single images.
        options: which network, which device, and how images are read.

    Returns:
        The report, ready for JSON: `score` is of the best classifier, `chosen` names it and says
        that it was chosen on the test set, `evaluations` holds all measurements.

    Raises:
        CheckpointError: the weights file or the saved state of the training cannot be used.
        ConfigError: a setting is out of range, a file cannot be written, or the state beside `out`
            belongs to another training.
        DataError: a set cannot be read or lacks labels, the classes differ, or there is only one.
        NonFiniteError: a feature is not a finite number, or every classifier has diverged.
    """
    if seed < 0:
        raise ConfigError(f"seed: need 0 or more, got {seed}")
    details.check()
    target = distributed.together(partial(check_target, out, weights_path))
    inputs = open_inputs(weights_path, train_spec, test_spec, options)
    plan = protocol.plan(inputs.backbone, images=len(inputs.train))
    settings = _protocol(protocol, plan, inputs, augment=augment, seed=seed)
    return train_and_report(
        "linear",
        inputs,
        lambda backbone: _Probe(backbone, inputs, plan, settings, augment=augment, seed=seed),
        protocol={"network": options.network, **settings},
        out=target,
        reporting=Reporting(untrained, log_path, details),
    )


Evaluation = dict[str, object]


class _Probe:
    """The classifiers of a plan on the features of one backbone."""

    def __init__(
        self,
        backbone: nn.Module,
        inputs: ClassifierInputs,
        plan: ProbePlan,
        settings: Mapping[str, object],
        *,
        augment: bool,
        seed: int,
    ) -> None:
        self._inputs, self._plan, self._options = inputs, plan, inputs.extractor.options
        self._settings, self._augment, self._seed = settings, augment, seed
        self._drawn = DrawnImages(len(inputs.train))
        self._best = Best()
        self._tokens = TokenFeatures(backbone, blocks=plan.blocks)
        self._heads = [
            LinearHeads(
                num_heads=len(plan.rates),
                num_classes=inputs.num_classes,
                width=self._tokens.token_dim * (kind.blocks + kind.pooled),
                seed=seed,
                device=inputs.device,
            )
            for kind in plan.kinds
        ]

    def save(self, evaluations: Sequence[Evaluation], out: Path) -> None:
        """Write the current best classifier as the last, and as the best of all if it is."""
        bests = [_best([evaluation]) for evaluation in evaluations]
        last, top1 = bests[-1], [best["top1"] for best in bests]
        kind, heads, at = self._find(last)
        tensors = {"weight": heads.weight[at], "bias": heads.bias[at]}
        about = self._card(kind, last).metadata()
        for target in weights_files(out, top1):
            save_tensors(target, tensors, about)

    def _card(self, kind: FeatureKind, measured: Mapping[str, object]) -> ProbeCard:
        of = (self._inputs.extractor, self._tokens.backbone, self._inputs.train)
        training = self._inputs.training(self._settings)
        return ProbeCard.of("linear", *of, measured=measured, training=training, tokens=kind)

    def chosen(self, evaluations: Sequence[Evaluation]) -> dict[str, object]:
        """The best classifier of the measurements that the protocol considers."""
        last_only = self._plan.last_only
        found = choose_best(
            _entries(evaluations[-1:] if last_only else evaluations), with_last=not last_only
        )
        return found | {"answers": self._best.answers}

    def extract(self) -> None:
        """Features of the test set and, without augmentation, of the train set."""
        key = self._tokens.output_key
        self._tests = extract_test_features(self._tokens, self._inputs, output_key=key)
        self._trains = None
        if not self._augment:
            self._trains = extract_train_features(self._tokens, self._inputs, output_key=key)

    def measured(self, state: State | None) -> Iterator[tuple[Evaluation, State]]:
        """Train, from a state if there is one; yield all measurements that are left."""
        plan, first = self._plan, 0
        if state is not None:
            first, self._drawn = state["step"], DrawnImages.of(state["drawn"])
            self._best = Best.of(state["best"])
            for heads, of_heads in zip(self._heads, state["heads"], strict=True):
                heads.load(of_heads)
        tests, test_labels = self._tests
        rates = torch.tensor(plan.rates, device=tests.device)
        batches = self._batches(first)
        bar = tqdm(
            batches,
            initial=first,
            total=plan.steps,
            unit="step",
            **bar_options(shown=self._options.progress),
        )
        for step, (features, labels) in enumerate(bar, start=first):
            now = rates * plan.factor(step)
            for kind, heads in zip(plan.kinds, self._heads, strict=True):
                heads.step(self._take(kind, features), labels, now)
            done = step + 1
            if done % plan.eval_every == 0 or done == plan.steps:
                yield self._measure(tests, test_labels, done), self._state(done)

    def _state(self, done: int) -> State:
        heads = [heads.state() for heads in self._heads]
        best = self._best.state()
        return {"step": done, "heads": heads, "drawn": self._drawn.state(), "best": best}

    def _find(self, entry: Mapping[str, Any]) -> tuple[FeatureKind, LinearHeads, int]:
        """A classifier of a measurement: its input, its heads, and its place among these."""
        kinds = [(kind.blocks, kind.pooled) for kind in self._plan.kinds]
        place = kinds.index((entry["blocks"], entry["pooled"]))
        at = self._plan.rates.index(entry["lr"])
        return self._plan.kinds[place], self._heads[place], at

    def _take(self, kind: FeatureKind, features: Tensor) -> Tensor:
        return kind.take(features, stored=self._plan.blocks, token_dim=self._tokens.token_dim)

    def _batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (N, ...) and labels (N,) of each step from the first on."""
        if self._trains is None:
            return self._of_crops(first)
        return self._of_whole_images(*self._trains, first)

    def _of_crops(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        plan, inputs = self._plan, self._inputs
        images = train_images(
            inputs,
            interpolation=plan.interpolation,
            batch_size=plan.batch_size,
            steps=plan.steps,
            first_step=first,
            seed=self._seed,
            num_workers=self._options.num_workers,
            drawn=self._drawn,
        )
        for pixels, labels in images:
            with torch.no_grad():
                yield self._tokens([pixels]).float(), labels
        inputs.used["train"] = self._drawn.used(inputs.train)

    def _of_whole_images(
        self, features: Tensor, labels: Tensor, first: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self._plan
        sampler = endless_sampler(
            len(features), batch_size=plan.batch_size, steps=plan.steps, seed=self._seed
        )
        for step in range(first, plan.steps):
            ids = torch.from_numpy(sampler.step(step).ids).to(features.device)
            yield features[ids], labels[ids]

    def _measure(self, tests: Tensor, labels: Tensor, done: int) -> Evaluation:
        results = []
        classes = self._inputs.num_classes
        for kind, heads in zip(self._plan.kinds, self._heads, strict=True):
            counts = heads.num_correct(self._take(kind, tests), labels)
            every = zip(self._plan.rates, counts, heads.finite(), strict=True)
            for rate, (top1, top5), finite in every:
                score = percent(top1, top5, images=len(labels), num_classes=classes)
                entry = {"blocks": kind.blocks, "pooled": kind.pooled, "lr": rate} | score
                results.append(entry | ({} if finite else {"diverged": True}))
        if all("diverged" in result for result in results):
            raise NonFiniteError(
                f"step {done}: all classifiers have non-finite weights; lower the learning rate"
            )
        epoch = {} if self._plan.last_only else {"epoch": done // self._plan.hold}
        evaluation: Evaluation = {"step": done, **epoch, "classifiers": results}
        best = _best([evaluation])
        if self._plan.last_only:
            self._best = Best()
        self._best.offer(best["top1"], partial(self._answers, best, tests))
        return evaluation

    def _answers(self, entry: Mapping[str, Any], tests: Tensor) -> Tensor:
        """The class that a classifier gives each test image, (N,)."""
        kind, heads, at = self._find(entry)
        return heads.answers(self._take(kind, tests), at)


def _best(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The best classifier of some measurements, the first of equals."""
    return max(_entries(evaluations), key=lambda entry: entry["top1"])


def _entries(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """All classifiers of some measurements that have not diverged."""
    return [
        {key: evaluation[key] for key in ("step", "epoch") if key in evaluation} | classifier
        for evaluation in evaluations
        for classifier in evaluation["classifiers"]  # type: ignore[attr-defined]  # a list
        if "diverged" not in classifier
    ]


_CHOSEN_OF = {True: "all classifiers after the last step", False: "all epochs"}


def _protocol(
    protocol: GridProtocol | DinoProtocol,
    plan: ProbePlan,
    inputs: ClassifierInputs,
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
        if is_vit(inputs.backbone)
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
        "test_images": inputs.extractor.preparation,
        "chosen": f"the best on the test set, of {_CHOSEN_OF[plan.last_only]}",
    }
