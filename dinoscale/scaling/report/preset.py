"""The preset to train next: the run nearest to an optimum, with the optimal size and images.

The optimum is that of the first budget of the first metric with a supported optimum. The loss, no
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
from dinoscale.config.sections.backbones import named_vit_size, num_vit_parameters
from dinoscale.errors import ConfigError
from dinoscale.reports.html import printable
from dinoscale.runtime.outputs import MARK
from dinoscale.scaling.laws.hyperparameters import (
    Size,
    describe_changes,
    is_larger,
    recommended_lr,
    rule_settings,
)
from dinoscale.scaling.laws.laws import MetricFit
from dinoscale.scaling.number_text import number
from dinoscale.scaling.report.conclusions import (
    Conclusion,
    first_conclusion,
    fit_reasons,
    measured,
    value_of,
)
from dinoscale.scaling.report.labels import exponential, interval, metric_name
from dinoscale.scaling.sweep.table import Row

RUN_DIR = "runs/recommended"
_STEPS, _REACH = 2000, 4.0  # the path of sizes: its steps, and its reach as a factor of N
_MAX_LOG = 20.0  # log of the largest width or depth on the path, far beyond any real one


@dataclass(frozen=True)
class Recommendation:
    """What to train next.

    Attributes:
        metric: the metric that it minimizes.
        conclusion: the conclusion that size and images come from.
        nearest: name of the run whose other settings are kept.
        size: model size, the nearest to the optimum on the path of sizes.
        images: D, at the FLOPs of the optimum.
        lr: peak learning rate.
        lr_from: origin of the learning rate.
        preset: text of the preset file.
    """

    metric: str
    conclusion: Conclusion
    nearest: str
    size: Size
    images: int
    lr: float
    lr_from: str
    preset: str

    def as_json(self) -> dict[str, Any]:
        """Everything except the preset."""
        optimum = self.conclusion.optimum
        return {
            "metric": self.metric,
            "approach": optimum.approach,
            "budget_flops": optimum.flops,
            "trust": self.conclusion.trust.name.lower(),
            "nearest_run": self.nearest,
            **{key: getattr(self.size, key) for key in ("embed_dim", "depth", "num_heads")},
            "parameters": self.size.parameters,
            "images": self.images,
            "lr": self.lr,
            "lr_from": self.lr_from,
        }


def recommend(rows: Sequence[Row], fits: Sequence[MetricFit]) -> Recommendation:
    """Derive the preset.

    Raises:
        ConfigError: no metric has a supported optimum, or the settings of the runs are unusable.
    """
    best = first_conclusion(fits)
    if best is None:
        raise ConfigError("no metric has an optimum that the runs support")
    fit, conclusion = best
    used = [row for row in measured(rows, fit.metric) if row.name not in fit.left_out]
    if not used:
        raise ConfigError(f"the fit of {fit.metric} uses no run of the table")
    nearest = _nearest(used, conclusion, fit.metric)
    try:
        config = parse_config(nearest.config, origin=f"run {nearest.name}")
    except ConfigError as error:
        raise ConfigError(
            f"the settings of run {nearest.name} do not fit this version ({error})"
        ) from None
    optimum = conclusion.optimum
    size = nearest_size(used, config, nearest, parameters=optimum.parameters.value)
    # FLOPs per image grow about as N: D is rescaled so that the rounded size keeps the budget.
    images = optimum.images.value * optimum.parameters.value / size.parameters
    lr, lr_from = recommended_lr(fit, config, nearest, parameters=size.parameters, images=images)
    ruled = rule_settings(config, nearest, size, images, lr)
    if "optim.lr" in ruled:
        lr_from += ", scaled by the rules of the sweep"
    changed = parse_config(
        _settings(config, nearest, size=size, images=images, lr=lr, ruled=ruled),
        origin="recommended",
    )
    found = Recommendation(
        metric=fit.metric,
        conclusion=conclusion,
        nearest=nearest.name,
        size=size,
        images=(changed.data.images_per_epoch or 0) * changed.train.epochs,
        lr=changed.peak_lr,
        lr_from=lr_from,
        preset="",
    )
    changes = describe_changes(size, nearest, config, ruled, rate_known=lr is not None)
    text = _comments(found, fit, changes) + dump_config(changed)
    _check(text, changed)
    return replace(found, preset=text)


def _nearest(rows: Sequence[Row], conclusion: Conclusion, metric: str) -> Row:
    """The nearest run in log N and log D; among equals the one with the lowest metric."""
    best = conclusion.optimum

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

    The path interpolates the logs of width and depth over log N, and extrapolates linearly beyond
    the outermost sizes (from a single size, at its depth). Among the whole numbers of heads and
    blocks around the path, the size with the nearest number of parameters is chosen.

    Args:
        rows: runs that define the path.
        config: configuration of the nearest run.
        nearest: the nearest run, whose head dimension is kept.
        parameters: N.

    Raises:
        ConfigError: the runs have no width and depth, or no known number of heads.
    """
    named = named_vit_size(config.model.backbone)
    heads = config.model.num_heads or (named.num_heads if named else None)
    patch = config.model.effective_patch_size
    if nearest.embed_dim is None or nearest.depth is None or patch is None:
        raise ConfigError(f"run {nearest.name} has no width and depth to scale, such as a ResNet")
    if heads is None:
        raise ConfigError(f"run {nearest.name}: its number of heads is unknown (model.num_heads)")

    def count(width: int, depth: int) -> int:
        return num_vit_parameters(
            img_size=config.crops.global_size,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            in_chans=config.data.channels,
        )

    # Ratio of the parameters of a variant to those of a plain ViT.
    ratio = nearest.parameters / count(nearest.embed_dim, nearest.depth)
    head_width = nearest.embed_dim // heads
    sizes = {
        size
        for width, depth in _path(rows, parameters)
        for size in itertools.product(_whole(width / head_width), _whole(depth))
    }
    num_heads, depth = min(
        sorted(sizes),
        key=lambda size: abs(math.log(ratio * count(size[0] * head_width, size[1]) / parameters)),
    )
    width = num_heads * head_width
    return Size(width, depth, num_heads, round(ratio * count(width, depth)))


def _path(rows: Sequence[Row], parameters: float) -> list[tuple[float, float]]:
    """Unrounded widths and depths, from a quarter of N to four times N."""
    known = {
        row.parameters: (row.embed_dim, row.depth) for row in rows if row.embed_dim and row.depth
    }
    log_n = np.log(sorted(known))
    log_sizes = np.log([known[n] for n in sorted(known)])  # (sizes, 2)
    if len(known) == 1:  # add a size of the same depth: N grows as the square of the width
        log_n = np.append(log_n, log_n[0] + 2)
        log_sizes = np.vstack([log_sizes, log_sizes[0] + [1, 0]])
    reach = math.log(_REACH)
    grid = math.log(parameters) + np.linspace(-reach, reach, _STEPS)
    path = make_interp_spline(log_n, log_sizes, k=1)(grid)  # (steps, 2)
    return [(width, depth) for width, depth in np.exp(np.clip(path, 0, _MAX_LOG)).tolist()]


def _whole(value: float) -> set[int]:
    """The whole numbers around a value; only the value itself if it is whole up to rounding."""
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
    """The settings of a run with another size, number of images and peak learning rate.

    A larger model may not fit in memory with the micro-batch of a smaller one: it is set to auto,
    unless batch norm makes it part of the recipe.
    """
    values = copy.deepcopy(dict(row.config))
    batch, epochs = config.train.batch_size, config.train.epochs
    batches = max(1, round(images / epochs / batch))  # per epoch
    new: dict[str, dict[str, object]] = {
        "model": {
            "embed_dim": size.embed_dim,
            "depth": size.depth,
            "num_heads": size.num_heads,
        },
        "data": {"images_per_epoch": batches * batch},
        "train": {"steps_per_epoch": None, "stop_after_steps": None},  # else it could end before D
        "optim": {} if lr is None else {"lr": lr / (config.peak_lr / config.optim.lr)},
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
    """The origin of the preset, as comments."""
    optimum, conclusion = found.conclusion.optimum, found.conclusion
    kind = ", the prediction interval of one run" if optimum.run else ""
    expected = f"; expect {interval(conclusion.expected)}{kind}" if conclusion.expected else ""
    paragraphs = [
        f"For the lowest {metric_name(found.metric)} at {exponential(optimum.flops)} training"
        f" FLOPs, by the {optimum.approach} approach ({100 * fit.confidence:g} % intervals):"
        f" parameters {interval(optimum.parameters)}, images {interval(optimum.images)} (confidence"
        f" intervals){expected}.",
        f"Trust: {conclusion.trust.name.lower()}. "
        + " ".join(reason.sentence for reason in [*conclusion.reasons, *fit_reasons(fit)]),
        f"This preset has {number(found.size.parameters)} parameters, the nearest size on the"
        f" path through those that were run, and {number(found.images)} images, for the same FLOPs."
        f" Peak learning rate: {number(found.lr)}, from {found.lr_from}. All other settings,"
        f" including the data, are those of run {found.nearest}.{changes}",
    ]
    lines = [MARK]
    for paragraph in paragraphs:
        lines += ["#", *textwrap.wrap(" ".join(printable(paragraph).split()), 98)]
    return "".join(f"{line}\n" if line[:1] == "#" else f"# {line}\n" for line in lines)


def _check(text: str, config: RunConfig) -> None:
    """Load the preset as a user will.

    Raises:
        ConfigError: it cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recommended.yaml"
        path.write_text(text, encoding="utf-8")
        if load_config(str(path)) != config:
            raise ConfigError("the recommended preset does not load as recommended")
