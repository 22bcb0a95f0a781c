"""Tables of a sweep drawn from a known law."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinoscale.scaling.sweep.table import Row

FLOPS_FACTOR, FLOPS_EXPONENT = 50.0, 0.95  # of an image: k N^g
_SIZES = np.geomspace(1e3, 1e12, 200_001)
STEP_OF_SIZES = float(_SIZES[1] / _SIZES[0] - 1)


@dataclass(frozen=True)
class Truth:
    """y = E + A / N^a + B / D^b."""

    irreducible: float = 0.15
    parameters_coefficient: float = 0.6 * 1e6**0.35
    parameters_exponent: float = 0.35
    images_coefficient: float = 0.5 * 1e6**0.4
    images_exponent: float = 0.4

    def at(self, parameters: float, images: float) -> float:
        of_parameters = self.parameters_coefficient / parameters**self.parameters_exponent
        return (
            self.irreducible
            + of_parameters
            + self.images_coefficient / images**self.images_exponent
        )

    def best_parameters(self, flops: float) -> float:
        """By trying all sizes; nothing here is shared with the code under test."""
        images = flops / (FLOPS_FACTOR * _SIZES**FLOPS_EXPONENT)
        return float(_SIZES[np.argmin(self.at(_SIZES, images))])  # type: ignore[arg-type]


def make_row(*, parameters: float, images: float, y: float | None, **changed: Any) -> Row:
    per_image = round(FLOPS_FACTOR * parameters**FLOPS_EXPONENT)
    values: dict[str, Any] = {
        "key": "",
        "name": f"n{parameters:.4g}-d{images:.4g}",
        "status": "done",
        "ended": "2030-01-01T00:00:00+00:00",
        "attempts": 1,
        "parameters": round(parameters),
        "flops_per_image": per_image,
        "images": round(images),
        "distinct_images": round(images),
        "steps": round(images / 64),
        "flops": per_image * round(images),
        "embed_dim": 192,
        "depth": 12,
        "batch_size": 64,
        "lr": 1e-3,
        "seed": 0,
        "seconds": 1.0,
        "ranks": 1,
        "metrics": {"knn": y},
        "curves": [],
        "axes": {},
        "config": {},
        "versions": {},
        **changed,
    }
    return Row(**values)


def grid(*, sizes: int = 5) -> list[tuple[float, float]]:
    """(N, D) of every model with every number of images, over a factor of 64."""
    steps = np.geomspace(1e6, 64e6, sizes)
    return list(itertools.product(steps, steps))


def isoflop(truth: Truth, *, budgets: int = 4, models: int = 6) -> list[tuple[float, float]]:
    """(N, D) around the best model of every budget, by a factor of 6 at most."""
    runs = []
    for flops in np.geomspace(1e15, 2.7e16, budgets):
        sizes = truth.best_parameters(flops) * np.geomspace(1 / 6, 6, models)
        runs += [(size, flops / (FLOPS_FACTOR * size**FLOPS_EXPONENT)) for size in sizes]
    return runs


def draw(
    truth: Truth, runs: Iterable[tuple[float, float]], *, noise: float, seed: int = 0
) -> list[Row]:
    """Rows with noise that is normal in log y."""
    generator = np.random.default_rng(seed)
    return [
        make_row(
            parameters=n, images=d, y=truth.at(n, d) * math.exp(noise * generator.standard_normal())
        )
        for n, d in runs
    ]
