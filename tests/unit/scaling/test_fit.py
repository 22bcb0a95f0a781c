"""Fits of known laws, and the warnings where the runs are too few."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from dinoscale.errors import ConfigError, DataError
from dinoscale.scaling.laws.fit import as_json, as_text, fit_rows
from dinoscale.scaling.laws.laws import MetricFit
from dinoscale.scaling.laws.robust_fit import _TOLERANCE
from dinoscale.scaling.sweep.table import Row
from tests.unit.scaling.synthetic import (
    FLOPS_EXPONENT,
    FLOPS_FACTOR,
    STEP_OF_SIZES,
    Truth,
    draw,
    grid,
    isoflop,
    make_row,
)

TRUTH = Truth()
# What the solver leaves: its last steps are at most the root of its tolerance, of exponents too,
# which multiply logs of parameters, images and FLOPs up to 42.
SOLVED = 42 * _TOLERANCE**0.5


def _fit(rows: list[Row], **options: object) -> MetricFit:
    (fit,) = fit_rows(rows, **{"samples": 80, **options})  # type: ignore[arg-type]
    return fit


def _says(fit: MetricFit, *words: str) -> bool:
    return any(all(word in caution for word in words) for caution in fit.cautions)


def test_laws_and_best_sizes_without_noise_are_the_true_ones() -> None:
    fit = _fit(draw(TRUTH, grid(), noise=0), budgets=[1e18])
    assert fit.joint
    assert fit.joint.parameters_exponent.value == pytest.approx(0.35, rel=SOLVED)
    assert fit.joint.images_exponent.value == pytest.approx(0.4, rel=SOLVED)
    assert fit.joint.r2 == pytest.approx(1)
    assert fit.joint.left_out_error == pytest.approx(0, abs=SOLVED)
    along = fit.laws["parameters"]  # at the most images: a law of its own with the same exponent
    assert along.exponent.value == pytest.approx(0.35, rel=SOLVED)
    at_most = TRUTH.at(math.inf, 64e6)
    assert along.irreducible.value == pytest.approx(at_most, rel=SOLVED)
    (optimum,) = fit.optima
    best = TRUTH.best_parameters(1e18)
    images = 1e18 / (FLOPS_FACTOR * best**FLOPS_EXPONENT)
    assert optimum.parameters.value == pytest.approx(best, rel=SOLVED + STEP_OF_SIZES)
    assert optimum.images.value == pytest.approx(images, rel=SOLVED + STEP_OF_SIZES)
    assert optimum.metric
    assert optimum.metric.value == pytest.approx(TRUTH.at(best, images), rel=SOLVED)
    (frontier,) = fit.frontiers
    exponent = 0.4 / (0.35 + FLOPS_EXPONENT * 0.4)
    assert frontier.parameters_exponent.value == pytest.approx(exponent, rel=SOLVED)
    assert frontier.optimum(np.array([1e18])).value == pytest.approx(optimum.parameters.value)


def test_parabolas_at_equal_budgets_find_the_best_size_of_each() -> None:
    fit = _fit(draw(TRUTH, isoflop(TRUTH), noise=0.003))
    assert [iso.flops for iso in fit.isoflops] == pytest.approx(
        [1e15, 3e15, 9e15, 2.7e16], rel=1e-3
    )
    for iso in fit.isoflops:
        assert iso.optimum
        assert iso.optimum.value == pytest.approx(TRUTH.best_parameters(iso.flops), rel=0.1)
        lowest = -iso.curve[1] / (2 * iso.curve[0])
        assert iso.optimum.value == pytest.approx(math.exp(lowest))
        assert np.polyval(iso.curve, np.log(iso.parameters)) == pytest.approx(iso.y, rel=0.03)
    assert {frontier.approach for frontier in fit.frontiers} == {"joint", "isoflop"}
    of_isoflop = [optimum for optimum in fit.optima if optimum.approach == "isoflop"]
    assert [optimum.extrapolation for optimum in of_isoflop] == pytest.approx([2, 10])
    for optimum in of_isoflop:
        true = TRUTH.best_parameters(optimum.flops)
        assert optimum.parameters.value == pytest.approx(true, rel=0.15)
        assert optimum.metric is None


@pytest.mark.parametrize("times", [1e-30, 1e30])
def test_a_metric_of_any_size_has_the_same_exponents(times: float) -> None:
    rows = [make_row(parameters=n, images=d, y=times * TRUTH.at(n, d)) for n, d in grid(sizes=3)]
    joint = _fit(rows).joint
    assert joint
    assert joint.parameters_exponent.value == pytest.approx(0.35, rel=SOLVED)
    assert joint.irreducible.value == pytest.approx(times * TRUTH.irreducible, rel=SOLVED)


def test_two_budgets_give_a_trend_without_interval() -> None:
    fit = _fit(draw(TRUTH, isoflop(TRUTH, budgets=2), noise=0.003))
    (frontier,) = [f for f in fit.frontiers if f.approach == "isoflop"]
    assert math.isinf(frontier.parameters_exponent.high)
    assert 0.3 < frontier.parameters_exponent.value < 0.8
    assert _says(fit, "Minima at 2 budgets", "its interval 3")


def test_the_same_table_gives_the_same_numbers_and_the_order_of_runs_hardly_any() -> None:
    rows = draw(TRUTH, grid(sizes=3), noise=0.02)
    first, again = as_json([_fit(rows)]), as_json([_fit(rows)])
    assert first == again
    turned = _fit(rows[::-1]).joint
    assert turned
    value = first["knn"]["joint"]["images_exponent"]["value"]
    assert turned.images_exponent.value == pytest.approx(value, rel=SOLVED)


def test_bands_hold_their_curve_and_the_runs() -> None:
    rows = draw(TRUTH, grid(), noise=0.02)
    fit = _fit(rows)
    assert fit.joint
    sizes = np.array([row.parameters for row in rows], float)
    band = fit.joint.band(sizes, np.full(len(rows), 64e6))
    assert band.value.shape == (25,)
    assert (band.low <= band.value).all()
    assert (band.value <= band.high).all()
    law = fit.laws["flops"]
    assert law.band(law.x).value == pytest.approx(law.y, rel=0.1)
    assert law.residuals == pytest.approx(np.log(law.y / law.band(law.x).value))


def test_seeds_are_one_point_and_of_other_settings_the_best_counts() -> None:
    rows = draw(TRUTH, grid(sizes=3), noise=0.01)
    seeds = [
        replace(
            row,
            name=f"{row.name}-{seed}",
            seed=seed,
            config={"seed": seed, "run_dir": f"runs/{seed}"},
            metrics={"knn": row.metrics["knn"] * factor},
        )
        for index, row in enumerate(rows)
        for seed, factor in ((1, 1 + 0.1 * index), (2, 1 / (1 + 0.1 * index)))
    ]
    worse = [
        replace(
            row,
            name=f"{row.name}-w",
            lr=1.0,
            metrics={"knn": 2 * row.metrics["knn"]},
            config={"x": 1},
        )
        for row in rows
    ]
    fit = _fit([*worse, *seeds])
    alone = _fit(rows)
    assert fit.joint
    assert alone.joint
    assert fit.num_runs == 27
    assert fit.joint.names == tuple(f"{row.name}-1" for row in rows)
    assert fit.joint.images_exponent.value == pytest.approx(alone.joint.images_exponent.value)


def test_best_rate_is_found_for_each_size_and_seeds_bound_it() -> None:
    rows = []
    for parameters, best in ((1e6, 2e-3), (8e6, 5e-4)):
        for lr in best * np.array([0.25, 0.5, 1, 2, 4]):
            y = 0.4 + 0.02 * math.log(lr / best) ** 2
            for seed, off in enumerate((-0.001, 0.001)):
                config = {"seed": seed, "optim": {"lr": lr, "min_lr": lr / 100}}
                rows.append(
                    make_row(
                        parameters=parameters,
                        images=1e6,
                        y=y + off,
                        lr=lr,
                        seed=seed,
                        config=config,
                        axes={"optim.lr": lr, "model": f"width {parameters:g}"},
                    )
                )
    fit = _fit(rows)
    first, second = fit.best_rates
    for rate, true in ((first, 2e-3), (second, 5e-4)):
        assert len(rate.lr) == 10
        assert rate.optimum
        assert rate.optimum.value == pytest.approx(true, rel=1e-6)
        assert 0.9 * true < rate.optimum.low < true < rate.optimum.high < 1.1 * true
    assert "width 1e+06" in first.label
    assert "lr" not in first.label


def test_a_best_rate_at_the_end_is_no_optimum() -> None:
    rows = [
        make_row(parameters=1e6, images=1e6, y=0.5 - 0.1 * i + 0.01 * i**2, lr=10.0 ** (i - 5))
        for i in range(3)
    ]
    fit = _fit(rows)
    assert fit.best_rates[0].optimum is None
    assert _says(fit, "best learning rate", "not between", "0.001")


def test_runs_that_cannot_be_used_are_left_out_with_a_reason() -> None:
    rows = draw(TRUTH, grid(sizes=3), noise=0.01)
    bad = [
        replace(rows[0], name="failed", status="failed", error="out of memory"),
        replace(rows[0], name="empty", metrics={"knn": None}),
        replace(rows[0], name="nan", metrics={"knn": math.nan}),
        replace(rows[0], name="zero", metrics={"knn": 0.0}),
        replace(rows[0], name="other", metrics={"loss": 1.0}),
        replace(rows[0], name="no images", images=0),
    ]
    (fit,) = fit_rows([*rows, *bad], metrics=["knn"], samples=100)
    assert fit.num_runs == 9
    assert fit.left_out == {
        "failed": "failed: out of memory",
        "empty": "knn is not a finite number",
        "nan": "knn is not a finite number",
        "zero": "knn is 0, but a power law is positive",
        "other": "knn was not measured",
        "no images": "images is 0",
    }
    assert _says(fit, "6 runs left out")


@pytest.mark.parametrize("count", range(1, 5))
def test_fewer_runs_than_parameters_are_a_sentence_and_no_law(count: int) -> None:
    fit = _fit(draw(TRUTH, grid(sizes=3), noise=0.01)[::2][:count])
    assert fit.joint is None
    assert not fit.frontiers
    assert not fit.optima
    assert _says(fit, "at least 5 settings", f"there are {count}")


def test_one_size_of_model_supports_only_a_law_in_images() -> None:
    runs = [(1e6, d) for d in np.geomspace(1e6, 64e6, 7)]
    fit = _fit(draw(TRUTH, runs, noise=0.005))
    assert fit.joint is None
    assert set(fit.laws) == {"images", "flops"}
    assert _says(fit, "3 model sizes and 3 numbers of images; there are 1 and 7")
    assert _says(fit, "No law in parameters", "there is 1")


def test_as_many_points_as_parameters_have_no_interval() -> None:
    runs = [(1e6, d) for d in (1e6, 8e6, 64e6)]
    fit = _fit(draw(TRUTH, runs, noise=0.005))
    law = fit.laws["images"]
    assert (law.exponent.low, law.exponent.high) == (-math.inf, math.inf)
    assert law.left_out_error is None
    assert _says(fit, "law in images seen", "as many parameters as points")
    written = as_json([fit])["knn"]["laws"]["images"]["exponent"]
    assert written["low"] is None
    assert written["high"] is None
    assert "(no bounds)" in as_text([fit])


def test_equal_results_and_results_that_rise_are_no_law() -> None:
    equal = _fit([make_row(parameters=n, images=d, y=0.5) for n, d in grid(sizes=3)])
    assert not equal.laws
    assert equal.joint is None
    assert _says(equal, "All runs have the same knn")
    rising = _fit(
        [make_row(parameters=n, images=d, y=0.1 * n**0.05 / d**0.02) for n, d in grid(sizes=3)]
    )
    assert "parameters" not in rising.laws
    assert not rising.optima
    assert _says(rising, "No law in parameters", "does not fall")
    assert _says(rising, "says nothing about the best use of a budget")


def test_noise_alone_is_warned_to_determine_nothing() -> None:
    generator = np.random.default_rng(3)
    rows = [
        make_row(parameters=n, images=d, y=0.5 * math.exp(0.1 * generator.standard_normal()))
        for n, d in grid(sizes=4)
    ]
    fit = _fit(rows)
    assert fit.joint
    assert _says(fit, "explains only")
    assert _says(fit, "nearly any value is possible") or _says(fit, "does not fall")


def test_passes_extrapolation_loss_and_eval_are_warned_of() -> None:
    rows = [
        replace(
            row,
            distinct_images=100_000,
            metrics={**row.metrics, "loss": 2.0},
            config={"eval": {"test": "a" if row.images > 2e6 else "b"}},
        )
        for row in draw(TRUTH, grid(sizes=4), noise=0.01)
    ]
    knn, loss = fit_rows(rows, samples=100, budgets=[1e20])
    assert _says(knn, "640 passes over the same images")
    assert _says(knn, "is extrapolated", "times the largest")
    assert _says(knn, "differ in the images or settings of eval")
    assert _says(loss, "no measure of quality")
    assert not _says(knn, "no measure of quality")


def test_a_well_planned_sweep_is_not_warned_of_the_exponents() -> None:
    fit = _fit(draw(TRUTH, grid(), noise=0.005))
    assert not _says(fit, "joint law")
    assert not _says(fit, "passes")
    assert not _says(fit, "extrapolated")


def test_json_holds_everything_but_functions_and_no_infinity() -> None:
    fits = [_fit(draw(TRUTH, isoflop(TRUTH, budgets=2), noise=0.01))]
    written = json.loads(json.dumps(as_json(fits), allow_nan=False))["knn"]
    assert set(written) == set(MetricFit.__dataclass_fields__)
    assert "band" not in written["joint"]
    assert len(written["joint"]["residuals"]) == 12
    assert written["frontiers"][1]["parameters_exponent"]["low"] is None
    assert len(written["isoflops"][0]["curve"]) == 3


def test_text_fits_100_columns_and_begins_with_the_warnings() -> None:
    rows = draw(TRUTH, isoflop(TRUTH), noise=0.02)
    failed = replace(rows[0], name="gone", status="failed", error="killed " * 40)
    text = as_text([_fit([*rows, failed])])
    assert max(map(len, text.splitlines())) <= 100
    assert text.index("Warnings:") < text.index("knn = E + A / N^a")
    assert "Best use of 54 PFLOPs (5.4e16), 2 times the largest run (joint)" in text
    assert "gone: failed: killed" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["knnn"]}, "'knnn' is not in the table, which has knn"),
        ({"budgets": [-1.0]}, "budget is -1"),
        ({"budgets": [math.nan]}, "budget is nan"),
        ({"confidence": 1.0}, "confidence is 1"),
        ({"confidence": 0.999}, "samples is 80, need 8000 to 20000"),
        ({"samples": 10}, "samples is 10, need 80"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _fit(draw(TRUTH, grid(sizes=3), noise=0.01), **options)


def test_a_table_without_metrics_is_an_error_and_without_a_usable_one_a_sentence() -> None:
    with pytest.raises(DataError, match="No metric to fit"):
        fit_rows([])
    row = make_row(parameters=1e6, images=1e6, y=None)
    with pytest.raises(DataError, match="1 run"):
        fit_rows([replace(row, metrics={})])
    fit = _fit([row])
    assert fit.num_runs == 0
    assert _says(fit, "No run has a usable knn")
    assert "nothing could be fitted" in as_text([fit])
