"""Transfer the settings of a run to another model size and number of images.

From the best learning rates found and the rules of the sweep, with notes on what remains unchecked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dinoscale.config import RunConfig
from dinoscale.config.sweep.rules import rules_of
from dinoscale.scaling.design.apply_rules import Sizes, apply_rules
from dinoscale.scaling.laws.laws import MetricFit
from dinoscale.scaling.number_text import SAME
from dinoscale.scaling.sweep.table import Row


@dataclass(frozen=True)
class Size:
    """The size of a ViT.

    Attributes:
        embed_dim: width.
        depth: number of blocks.
        num_heads: attention heads per block.
        parameters: N.
    """

    embed_dim: int
    depth: int
    num_heads: int
    parameters: int


def recommended_lr(
    fit: MetricFit, config: RunConfig, nearest: Row, *, parameters: float, images: float
) -> tuple[float | None, str]:
    """Peak learning rate k N^p D^q fitted to the best rates of this batch size, and its origin.

    If all of them share one N or one D, its exponent cannot be determined and is set to 0.
    """
    found = [
        (rate.parameters, rate.images, rate.optimum.value)
        for rate in fit.best_rates
        if rate.optimum is not None and rate.batch_size == config.train.batch_size
    ]
    if not found:
        return None, f"run {nearest.name}"
    sizes, lengths, rates = np.log(np.maximum(found, 1e-300)).T
    known = np.array([np.ptp(sizes) > SAME, np.ptp(lengths) > SAME])
    axes = np.stack((sizes - sizes.mean(), lengths - lengths.mean()), -1) * known  # (n, 2)
    powers = np.linalg.pinv(axes, rcond=1e-6) @ (rates - rates.mean())
    there = np.array([math.log(parameters) - sizes.mean(), math.log(images) - lengths.mean()])
    rate = float(np.exp(rates.mean() + powers @ (there * known)))
    text = f"the best rates found at batch size {nearest.batch_size}"
    if all(known):
        text += f", as parameters^{powers[0]:.2g} x images^{powers[1]:.2g}"
    elif abs(there[1]) > SAME:
        text += " and one number of images only: check it for this one"
    return float(f"{rate:.3g}"), text


def rule_settings(
    config: RunConfig, row: Row, size: Size, images: float, lr: float | None
) -> dict[str, object]:
    """The settings that the rules give at another size and length, by dotted key.

    A learning rate that was found is not scaled again.
    """
    rules = rules_of(row.rules)
    if rules is None or not row.embed_dim or not row.depth:
        return {}
    now, base = (
        Sizes(
            batch_size=row.batch_size,
            width=width,
            depth=depth,
            images=round(seen),
            parameters=parameters,
        )
        for width, depth, seen, parameters in (
            (size.embed_dim, size.depth, images, size.parameters),
            (row.embed_dim, row.depth, row.images, row.parameters),
        )
    )
    ruled = apply_rules(rules, config, sizes=now, base=base, lr_factor=1.0)
    if lr is not None:
        ruled.pop("optim.lr", None)
    return ruled


def is_larger(size: Size, row: Row) -> bool:
    """Whether a size is larger than that of a run, beyond rounding."""
    return size.parameters > (1 + SAME) * row.parameters


def describe_changes(
    size: Size, nearest: Row, config: RunConfig, ruled: Mapping[str, object], rate_known: bool
) -> str:
    """Sentences on the settings that the rules changed, and on what to check."""
    text = ""
    if ruled:
        text += f" Set by the rules of the sweep: {', '.join(sorted(ruled))}."
    elif not nearest.rules and not rate_known:
        text += " The table holds no rules of the sweep: no setting was scaled with the size."
    if is_larger(size, nearest):
        how = "is that of the smaller run" if config.head.batch_norm else "is found by trial"
        text += (
            f" The model is larger than that of {nearest.name}: its micro-batch size {how}; check"
            f" with `dinoscale plan recommended.yaml --gpus N --gpu NAME` that ZeRO stage"
            f" {config.engine.zero_stage} suffices."
        )
    return text
