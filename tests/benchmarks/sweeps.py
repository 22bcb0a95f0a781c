"""How often intervals hold the truth, and what collapsed runs do to a fit, in simulated sweeps.

python -m tests.benchmarks.sweeps [--trials 100]

Sweeps are drawn from a known law with noise; see `tests/unit/scaling/synthetic.py`. A collapsed run
has a k-NN error of 0.9 to 0.95, whatever its size and length.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from dinoscale.scaling.laws.fit import fit_rows
from dinoscale.scaling.laws.isoflop import fit_isoflops
from dinoscale.scaling.laws.laws import Interval, MetricFit
from dinoscale.scaling.laws.selection import group_by_setting
from dinoscale.scaling.sweep.table import Row
from tests.unit.scaling.synthetic import (
    FLOPS_EXPONENT,
    FLOPS_FACTOR,
    Truth,
    draw,
    isoflop,
)

TRUTH = Truth()
SAMPLES = 200
WHOLE = 5  # of so many sweeps one is fitted as a whole, which takes seconds
Runs = list[tuple[float, float]]


def ladder(*, budgets: int = 4, models: int = 6, span: float = 6.0) -> Runs:
    """The same models at every budget, as the file of a sweep has them: (N, D)."""
    flops = np.geomspace(1e15, 2.7e16, budgets)
    middle = math.sqrt(TRUTH.best_parameters(flops[0]) * TRUTH.best_parameters(flops[-1]))
    sizes = middle * np.geomspace(1 / span, span, models)
    return [(n, c / (FLOPS_FACTOR * n**FLOPS_EXPONENT)) for c in flops for n in sizes]


DESIGNS: dict[str, tuple[Runs, float]] = {  # runs, noise in log y
    "4 budgets x 6 models around each best, 1 %": (isoflop(TRUTH), 0.01),
    "the same, 0.2 %": (isoflop(TRUTH), 0.002),
    "4 budgets x the same 6 models, 1 %": (ladder(), 0.01),
    "3 budgets x the same 5 models, 1 %": (ladder(budgets=3, models=5), 0.01),
}


def coverage(runs: Runs, noise: float, *, trials: int) -> dict[str, float]:
    """Share of 90 % intervals that hold the truth, in percent."""
    flops = 2.0 * _largest(runs)
    held: dict[str, list[bool]] = defaultdict(list)
    for trial in range(trials):
        rows = draw(TRUTH, runs, noise=noise, seed=trial)
        found = list(_minima(rows))
        if trial < trials // WHOLE:
            found += _intervals(_fit(rows, flops), noise, trial)
        for name, interval, true in found:
            held[name].append(interval.low <= true <= interval.high)
    return {name: round(100 * float(np.mean(found)), 1) for name, found in held.items()}


def _intervals(fit: MetricFit, noise: float, trial: int) -> Iterator[tuple[str, Interval, float]]:
    for optimum in fit.optima:
        best = TRUTH.best_parameters(optimum.flops)
        yield f"best size at twice the budget, {optimum.approach}", optimum.parameters, best
        if optimum.metric:
            new = math.exp(noise * np.random.default_rng([trial, 1]).standard_normal())
            there = TRUTH.at(optimum.parameters.value, optimum.images.value)
            run = getattr(optimum, "run", None)  # earlier versions had none
            yield "one new run", run or optimum.metric, there * new


def _minima(rows: list[Row]) -> Iterator[tuple[str, Interval, float]]:
    curves, _ = fit_isoflops(group_by_setting(rows, "knn"), confidence=0.9, samples=SAMPLES)
    for curve in curves:
        if curve.optimum:
            yield "minimum at a budget", curve.optimum, TRUTH.best_parameters(curve.flops)


def planted(runs: Runs, noise: float, *, bad: int, trials: int) -> dict[str, object]:
    """Error of the best size as a factor, and coverage in percent, with some runs collapsed."""
    flops = 2.0 * _largest(runs)
    best, left_out = TRUTH.best_parameters(flops), []
    factors: dict[str, list[float]] = defaultdict(list)
    widths: dict[str, list[float]] = defaultdict(list)
    held: dict[str, list[bool]] = defaultdict(list)
    for trial in range(trials):
        rows = draw(TRUTH, runs, noise=noise, seed=trial)
        generator = np.random.default_rng([trial, 2])
        for place in generator.choice(len(rows), bad, replace=False):
            rows[place] = replace(rows[place], metrics={"knn": generator.uniform(0.9, 0.95)})
        fit = _fit(rows, flops)
        left_out.append(len(fit.left_out))
        for optimum in fit.optima:
            found = optimum.parameters
            factors[optimum.approach].append(math.exp(abs(math.log(found.value / best))))
            widths[optimum.approach].append(found.high / found.low)
            held[optimum.approach].append(found.low <= best <= found.high)
    return {
        "left out": round(float(np.mean(left_out)), 2),
        **{
            name: {
                "sweeps": len(found),
                "factor, median": round(float(np.median(found)), 3),
                "factor, largest": round(max(found), 3),
                "high over low, median": round(float(np.median(widths[name])), 3),
                "coverage": round(100 * float(np.mean(held[name])), 1),
            }
            for name, found in factors.items()
        },
    }


def _largest(runs: Runs) -> float:
    return float(max(row.flops for row in draw(TRUTH, runs, noise=0)))


def _fit(rows: list[Row], flops: float) -> MetricFit:
    (fit,) = fit_rows(rows, budgets=[flops], samples=SAMPLES)
    return fit


def main() -> None:
    """Simulate, and print JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100, help="sweeps (default 100)")
    trials = parser.parse_args().trials
    print(f"{6 * trials // WHOLE} whole fits, each a second of an idle core", file=sys.stderr)
    result: dict[str, object] = {}
    for name, (runs, noise) in DESIGNS.items():
        result[name] = coverage(runs, noise, trials=trials)
        print(name, result[name], flush=True, file=sys.stderr)
    runs, noise = next(iter(DESIGNS.values()))
    for bad in (1, 2):
        result[f"{bad} of 24 collapsed"] = planted(runs, noise, bad=bad, trials=trials // WHOLE)
        print(f"{bad} of 24", result[f"{bad} of 24 collapsed"], flush=True, file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
