"""Sweeps and fits made from a known law, y = E + A / N^a + B / D^b, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dinoscale.config import parse_config
from dinoscale.config.sections.backbones import num_vit_parameters
from dinoscale.scaling.laws.laws import (
    Band,
    BestRate,
    Frontier,
    Interval,
    IsoFlop,
    JointLaw,
    MetricFit,
    Numbers,
    Optimum,
    PowerLaw,
)
from dinoscale.scaling.sweep.table import Row

E, A, ALPHA, B, BETA = 0.12, 10.0, 0.35, 22.0, 0.38
FLOPS = 60  # of a parameter and image
HEAD = 32  # width of a head
BATCH = 64
SHAPES = ((64, 3), (96, 4), (128, 6), (192, 8))  # width, depth
NOISE = 0.01


def law(n: Any, d: Any) -> Any:
    return E + A / n**ALPHA + B / d**BETA


def best_n(c: Any) -> Any:
    """Where the law is lowest along C = FLOPS x N x D."""
    ratio = (ALPHA * A) / (BETA * B)
    return ratio ** (1 / (ALPHA + BETA)) * (c / FLOPS) ** (BETA / (ALPHA + BETA))


def a_row(
    width: int = 64,
    depth: int = 3,
    images: int = 64_000,
    *,
    seed: int = 0,
    lr: float = 2e-3,
    **changes: Any,
) -> Row:
    model = {
        "backbone": "vit_tiny_patch16_224",
        "patch_size": 4,
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // HEAD,
    }
    config = parse_config(
        {
            "seed": seed,
            "model": model,
            "crops": {"global_size": 24, "local_size": 12},
            "train": {"epochs": 10, "batch_size": BATCH, "stop_after_steps": 7},
            "data": {"train": "synthetic:shapes?images=1600&size=30"},
            "optim": {"lr": lr * 256 / BATCH, "warmup_epochs": 1},
            "dino": {"warmup_teacher_temp_epochs": 0},
            "eval": {"resize": 24, "crop": 24},
        }
    )
    n = num_vit_parameters(img_size=24, patch_size=4, embed_dim=width, depth=depth)
    name = f"w{width}-d{depth}-i{images}-s{seed}-lr{lr:g}"
    rng = np.random.default_rng([width, depth, images, seed])
    knn = float(law(n, images) * np.exp(NOISE * rng.normal()))
    over_time = [images * part // 8 for part in range(1, 9)]
    row = Row(
        key=f"{abs(hash(name)):016x}"[:16],
        name=name,
        status="done",
        ended="2024-01-01T00:00:00+00:00",
        attempts=1,
        parameters=n,
        flops_per_image=FLOPS * n,
        images=images,
        distinct_images=1600,
        steps=images // BATCH,
        flops=FLOPS * n * images,
        embed_dim=width,
        depth=depth,
        batch_size=BATCH,
        lr=lr,
        seed=seed,
        seconds=images * n * 1e-9,
        ranks=2,
        metrics={"knn": knn, "loss": 8 * knn},
        curves=[
            {"step": seen // BATCH, "images": seen, "knn": float(law(n, seen)) * 1.1}
            for seen in over_time
        ],
        axes={"model.embed_dim": width, "seed": seed},
        config=config.model_dump(mode="json"),
        versions={"python": "3.12.1", "torch": "2.6.0", "commit": "abc"},
    )
    return replace(row, **changes)


def grid(shapes: Sequence[tuple[int, int]] = SHAPES, *, seeds: int = 2) -> list[Row]:
    return [
        a_row(width, depth, images, seed=seed)
        for width, depth in shapes
        for images in (32_000, 96_000, 320_000, 960_000)
        for seed in range(seeds)
    ]


def around(value: float, share: float = 0.2) -> Interval:
    return Interval(value, value / (1 + share), value * (1 + share))


def _band(value: Numbers, share: float) -> Band:
    return Band(value, value / (1 + share), value * (1 + share))


def a_power_law(rows: Sequence[Row], metric: str, quantity: str, scale: float) -> PowerLaw:
    x = np.array([getattr(row, quantity) for row in rows], float)
    best = sorted(set(x.tolist()))
    y = np.array([min(row.metrics[metric] for row in rows if getattr(row, quantity) == v)
                  for v in best])  # fmt: skip
    floor = 0.8 * y.min()
    slope, start = np.polyfit(np.log(best), np.log(y - floor), 1)

    def band(at: Numbers) -> Band:
        far = np.abs(np.log(at / np.median(best))) * 0.01 + 0.02
        value = floor + np.exp(start) * at**slope
        return Band(value, value * (1 - far), value * (1 + far))

    value = band(np.array(best)).value
    return PowerLaw(
        quantity,
        around(floor),
        around(float(np.exp(start)), 1.5),
        around(-float(slope)),
        np.array(best),
        y,
        np.log(y / value),
        0.97,
        0.04 * scale,
        band,
    )


def a_fit(rows: Sequence[Row], metric: str = "knn", **changes: Any) -> MetricFit:
    """A fit that knows the law; of all runs that have the metric."""
    used = [row for row in rows if row.status == "done" and row.metrics.get(metric) is not None]
    scale = 8.0 if metric == "loss" else 1.0
    n = np.array([row.parameters for row in used], float)
    d = np.array([row.images for row in used], float)
    y = np.array([row.metrics[metric] for row in used], float)
    joint = JointLaw(
        around(scale * E),
        around(scale * A, 1.0),
        around(ALPHA),
        around(scale * B, 1.0),
        around(BETA),
        tuple(row.name for row in used),
        np.log(y / (scale * law(n, d))),
        0.992,
        0.021,
        lambda n, d: _band(scale * law(n, d), 0.04),
    )
    largest = max(row.flops for row in used)
    frontier = Frontier(
        "joint",
        around(BETA / (ALPHA + BETA), 0.1),
        around(ALPHA / (ALPHA + BETA), 0.1),
        lambda c: _band(best_n(c), 0.3),
    )
    isoflops = tuple(_isoflop(largest / 3**i, scale) for i in (3, 2, 1, 0))
    fit = MetricFit(
        metric=metric,
        confidence=0.9,
        num_runs=len(used),
        left_out={},
        laws={q: a_power_law(used, metric, q, scale) for q in ("parameters", "images", "flops")},
        joint=joint,
        isoflops=isoflops,
        frontiers=(replace(frontier, approach="isoflop"), frontier),
        optima=tuple(
            an_optimum(approach, factor * largest, factor, scale, share)
            for factor in (2.0, 10.0)
            for approach, share in (("isoflop", 0.5), ("joint", 0.3))
        ),
        best_rates=(),
        cautions=(),
    )
    return replace(fit, **changes)


def _isoflop(c: float, scale: float) -> IsoFlop:
    n = best_n(c) * np.array([0.25, 0.5, 1.0, 2.0, 4.0])
    y = scale * law(n, c / FLOPS / n)
    curve = np.polyfit(np.log(n), y, 2)
    return IsoFlop(c, n, y, curve, around(float(np.exp(-curve[1] / 2 / curve[0]))))


def an_optimum(
    approach: str, c: float, extrapolation: float, scale: float = 1.0, share: float = 0.3
) -> Optimum:
    n = float(best_n(c))
    d = c / FLOPS / n
    expected = around(float(scale * law(n, d)), 0.05) if approach == "joint" else None
    return Optimum(approach, c, around(n, share), around(d, share), expected, extrapolation)


def a_best_rate(row: Row, *, optimum: bool = True) -> BestRate:
    lr = np.array([5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    best = 2e-3 * (row.parameters / 200_000) ** -0.3 if optimum else 2e-2
    y = row.metrics["knn"] * (1 + 0.05 * np.log(lr / best) ** 2)
    curve = np.polyfit(np.log(lr), y, 2)
    return BestRate(
        f"{row.embed_dim} x {row.depth}",
        row.parameters,
        row.batch_size,
        lr,
        y,
        curve,
        around(best) if optimum else None,
    )


def no_fit(rows: Sequence[Row], metric: str = "knn") -> MetricFit:
    """What is left where the runs support nothing."""
    used = [row for row in rows if row.status == "done" and row.metrics.get(metric) is not None]
    return MetricFit(
        metric, 0.9, len(used), {}, {}, None, (), (), (), (),
        (f"{len(used)} runs cannot support a law of 5 coefficients",),
    )  # fmt: skip
