"""The preset to train next: settings of the run nearest to an optimum, with its size and images.

The optimum is that of the first budget of the first metric which has a supported one; the loss, no
measure of quality, counts only where nothing else was measured.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import make_interp_spline

from dinoscale.config import RunConfig, dump_config, load_config, parse_config
from dinoscale.config.backbones import named_vit_size, num_vit_parameters
from dinoscale.errors import ConfigError
from dinoscale.reports.html import printable
from dinoscale.runtime.outputs import MARK
from dinoscale.scaling.laws.hyperparameters import Size, changes_of, is_larger, rate_of, ruled_for
from dinoscale.scaling.laws.laws import MetricFit
from dinoscale.scaling.number_text import number
from dinoscale.scaling.report.conclusions import (
    Answer,
    best_answers,
    fit_reasons,
    measured,
    value_of,
)
from dinoscale.scaling.report.labels import exponential, interval, metric_name
from dinoscale.scaling.sweep.table import Row

RUN_DIR = "runs/recommended"
_STEPS, _REACH = 2000, 4.0  # the path of sizes: its steps, and how far from N it goes, a factor
_MOST = 20.0  # log of the largest width or depth on it, far beyond any


@dataclass(frozen=True)
class Recommendation:
    """What to train next.

    Attributes:
        metric: that it is best for.
        answer: where size and images come from.
        nearest: name of the run whose settings are kept.
        size: of the model, nearest to the best among the sizes of the ladder.
        images: D, for the same FLOPs as the optimum.
        lr: peak learning rate.
        lr_from: where that comes from.
        preset: the file.
    """

    metric: str
    answer: Answer
    nearest: str
    size: Size
    images: int
    lr: float
    lr_from: str
    preset: str

    def as_json(self) -> dict[str, Any]:
        """All but the file."""
        optimum = self.answer.optimum
        return {
            "metric": self.metric,
            "approach": optimum.approach,
            "budget_flops": optimum.flops,
            "trust": self.answer.trust.name.lower(),
            "nearest_run": self.nearest,
            **{key: getattr(self.size, key) for key in ("embed_dim", "depth", "num_heads")},
            "parameters": self.size.parameters,
            "images": self.images,
            "lr": self.lr,
            "lr_from": self.lr_from,
        }


def recommend(rows: Sequence[Row], fits: Sequence[MetricFit]) -> Recommendation:
    """Work out the preset.

    Raises:
        ConfigError: no metric has a supported optimum, or the settings of the runs cannot be used.
    """
    best = best_answers(fits)
    if best is None:
        raise ConfigError("no metric has an optimum that the runs support")
    fit, answer = best
    used = [row for row in measured(rows, fit.metric) if row.name not in fit.left_out]
    if not used:
        raise ConfigError(f"no run of the table was used for the fit of {fit.metric}")
    nearest = _nearest(used, answer, fit.metric)
    try:
        config = parse_config(nearest.config, origin=f"run {nearest.name}")
    except ConfigError as error:
        raise ConfigError(
            f"the settings of run {nearest.name} are not of this version ({error})"
        ) from None
    optimum = answer.optimum
    size = nearest_size(used, config, nearest, parameters=optimum.parameters.value)
    # FLOPs of an image grow about as N: the rounded size keeps the budget by fewer or more images.
    images = optimum.images.value * optimum.parameters.value / size.parameters
    lr, lr_from = rate_of(fit, config, nearest, parameters=size.parameters, images=images)
    ruled = ruled_for(config, nearest, size, images, lr)
    if "optim.lr" in ruled:
        lr_from += " by the rules of the sweep"
    changed = parse_config(
        _settings(config, nearest, size=size, images=images, lr=lr, ruled=ruled),
        origin="recommended",
    )
    found = Recommendation(
        metric=fit.metric,
        answer=answer,
        nearest=nearest.name,
        size=size,
        images=(changed.data.images_per_epoch or 0) * changed.train.epochs,
        lr=changed.peak_lr,
        lr_from=lr_from,
        preset="",
    )
    changes = changes_of(size, nearest, config, ruled, rate_known=lr is not None)
    text = _comments(found, fit, changes) + dump_config(changed)
    _check(text, changed)
    return replace(found, preset=text)


def _nearest(rows: Sequence[Row], answer: Answer, metric: str) -> Row:
    """In log N and log D, then with the lowest metric."""
    best = answer.optimum

    def distance(row: Row) -> tuple[float, float, str]:
        apart = math.hypot(
            math.log(row.parameters / best.parameters.value),
            math.log(row.images / best.images.value),
        )
        return round(apart, 9), value_of(row, metric), row.name

    return min(rows, key=distance)


def nearest_size(
    rows: Sequence[Row], config: RunConfig, nearest: Row, *, parameters: float
) -> Size:
    """The ViT closest to a number of parameters on the path through the sizes that were run.

    Along the path, logs of width and depth are interpolated over log N, and outside go on as
    between the two outermost sizes (with one size alone, its depth stays). Of the whole numbers of
    heads and blocks around it, those with the nearest number of parameters are taken.

    Args:
        rows: runs, for their sizes.
        config: of the nearest run.
        nearest: that run, whose heads are taken.
        parameters: N.

    Raises:
        ConfigError: the runs have no width and depth, or no known number of heads.
    """
    named = named_vit_size(config.model.backbone)
    heads = config.model.num_heads or (named.num_heads if named else None)
    patch = config.model.effective_patch_size
    if nearest.embed_dim is None or nearest.depth is None or patch is None:
        raise ConfigError(f"run {nearest.name} has no width and depth to choose, as of a ResNet")
    if heads is None:
        raise ConfigError(f"run {nearest.name} does not say its number of heads (model.num_heads)")

    def count(width: int, depth: int) -> int:
        return num_vit_parameters(
            img_size=config.crops.global_size,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            in_chans=config.data.channels,
        )

    # What a variant has more than a plain ViT, as a factor.
    more = nearest.parameters / count(nearest.embed_dim, nearest.depth)
    head_width = nearest.embed_dim // heads
    sizes = {
        size
        for width, depth in _path(rows, parameters)
        for size in itertools.product(_whole(width / head_width), _whole(depth))
    }
    num_heads, depth = min(
        sorted(sizes),
        key=lambda size: abs(math.log(more * count(size[0] * head_width, size[1]) / parameters)),
    )
    width = num_heads * head_width
    return Size(width, depth, num_heads, round(more * count(width, depth)))


def _path(rows: Sequence[Row], parameters: float) -> list[tuple[float, float]]:
    """Widths and depths, not rounded, from a quarter of N to four times N."""
    known = {
        row.parameters: (row.embed_dim, row.depth) for row in rows if row.embed_dim and row.depth
    }
    log_n = np.log(sorted(known))
    log_sizes = np.log([known[n] for n in sorted(known)])  # (sizes, 2)
    if len(known) == 1:  # a second size of the same depth: N grows as the square of the width
        log_n = np.append(log_n, log_n[0] + 2)
        log_sizes = np.vstack([log_sizes, log_sizes[0] + [1, 0]])
    reach = math.log(_REACH)
    grid = math.log(parameters) + np.linspace(-reach, reach, _STEPS)
    path = make_interp_spline(log_n, log_sizes, k=1)(grid)  # (steps, 2)
    return [(width, depth) for width, depth in np.exp(np.clip(path, 0, _MOST)).tolist()]


def _whole(value: float) -> set[int]:
    """The whole numbers around a value, itself where it is one up to rounding."""
    near = round(value, 6)
    return {max(1, math.floor(near)), max(1, math.ceil(near))}


def _settings(
    config: RunConfig,
    row: Row,
    *,
    size: Size,
    images: float,
    lr: float | None,
    ruled: Mapping[str, object],
) -> dict[str, Any]:
    """Settings of a run with another size, number of images and peak learning rate.

    A larger model may not fit with the micro-batch of a smaller one: it is found by trial at the
    start, unless batch norm makes it part of the recipe.
    """
    values = copy.deepcopy(dict(row.config))
    batch, epochs = config.train.batch_size, config.train.epochs
    batches = max(1, round(images / epochs / batch))  # of an epoch
    new: dict[str, dict[str, object]] = {
        "model": {
            "embed_dim": size.embed_dim,
            "depth": size.depth,
            "num_heads": size.num_heads,
        },
        "data": {"images_per_epoch": batches * batch},
        "train": {"stop_after_steps": None},  # or it would end before D
        "optim": {} if lr is None else {"lr": lr * 256 / batch},  # as `RunConfig.peak_lr`
    }
    if is_larger(size, row) and not config.head.batch_norm:
        new["train"]["micro_batch_size"] = "auto"
    for key, value in ruled.items():
        section, _, name = key.partition(".")
        new.setdefault(section, {})[name] = value
    for section, changes in new.items():
        values[section] = {**values.get(section, {}), **changes}
    return {**values, "run_dir": RUN_DIR, "resume": True}


def _comments(found: Recommendation, fit: MetricFit, changes: str) -> str:
    """Where the preset comes from, as comments."""
    optimum, answer = found.answer.optimum, found.answer
    kind = ", the prediction interval of one run" if optimum.run else ""
    expected = f"; expect {interval(answer.expected)}{kind}" if answer.expected else ""
    paragraphs = [
        f"For the lowest {metric_name(found.metric)} of a training of"
        f" {exponential(optimum.flops)} FLOPs, by the"
        f" {optimum.approach} approach ({100 * fit.confidence:g} % intervals): parameters"
        f" {interval(optimum.parameters)}, images {interval(optimum.images)} (confidence"
        f" intervals){expected}.",
        f"Trust: {answer.trust.name.lower()}. "
        + " ".join(reason.sentence for reason in [*answer.reasons, *fit_reasons(fit)]),
        f"Here: {number(found.size.parameters)} parameters, the nearest size of the ladder, and"
        f" {number(found.images)} images for the same FLOPs. Peak learning rate"
        f" {number(found.lr)}, from {found.lr_from}. All other settings are of run"
        f" {found.nearest}, its data too.{changes}",
    ]
    lines = [MARK]
    for paragraph in paragraphs:
        lines += ["#", *textwrap.wrap(" ".join(printable(paragraph).split()), 98)]
    return "".join(f"{line}\n" if line[:1] == "#" else f"# {line}\n" for line in lines)


def _check(text: str, config: RunConfig) -> None:
    """Load a preset as people will.

    Raises:
        ConfigError: it cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recommended.yaml"
        path.write_text(text, encoding="utf-8")
        if load_config(str(path)) != config:
            raise ConfigError("the recommended preset does not load as what was recommended")
