"""The report of a sweep, from known runs and fits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoscale.config import load_config, parse_config
from dinoscale.errors import ConfigError
from dinoscale.runtime.outputs import MARK
from dinoscale.scaling.laws.laws import Interval, Optimum
from dinoscale.scaling.number_text import number
from dinoscale.scaling.report.conclusions import Trust, conclusions, runs_to_add
from dinoscale.scaling.report.labels import interval, percent
from dinoscale.scaling.report.plot_axes import log_ticks, tick_labels
from dinoscale.scaling.report.plots import draw_metric
from dinoscale.scaling.report.preset import nearest_size, recommend
from dinoscale.scaling.report.tables import outliers, version_differences
from dinoscale.scaling.report.write import PRESET, write_report
from dinoscale.scaling.sweep.table import Row, append_row, read_table
from tests.unit.scaling.known import a_best_rate, a_fit, a_row, an_optimum, around, grid, no_fit

ODD = "<script>alert(1)</script> $x_1$ \u6f22 & '\"\n# \x00"


def _rows() -> list[Row]:
    failed = a_row(
        128, 6, 320_000, seed=7, status="failed", metrics={}, curves=[], error="The disk is full."
    )
    other = a_row(seed=5, versions={"python": "3.12.1", "torch": "2.7.0", "commit": "abc"})
    diverged = [{"step": 1.0, "images": 64.0, "knn": math.nan}]
    unmeasured = a_row(seed=6, metrics={"knn": None}, curves=diverged)
    return [*grid(((64, 3), (96, 4), (128, 6)), seeds=1), failed, other, unmeasured]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A report with everything in it; from a copied table."""
    folder = tmp_path_factory.mktemp("sweep")
    for row in _rows():
        append_row(folder / "results.csv", row)
    rows = read_table(folder / "results.csv")
    fit = a_fit(
        rows,
        left_out={rows[0].name: "it diverged"},
        best_rates=(a_best_rate(rows[0]), a_best_rate(rows[4], optimum=False)),
        cautions=("The limit E cannot be told from 0.",),
    )
    return folder / "report", write_report(rows, [fit, no_fit(rows, "loss")], folder / "report")


def _page(folder: Path) -> str:
    return (folder / "report.html").read_text()


class _Text(HTMLParser):
    """All words of a page, and the addresses of its pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += f"{data} "


def test_a_page_says_what_to_train_next_and_how_far_to_trust_it(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    words = _Text(_page(whole[0])).words
    best = a_fit(_rows()).optima[1]
    assert f"train a model of {interval(best.parameters)} parameters on" in words
    assert interval(best.images) in words
    assert "Trust: limited." in words
    assert "The limit E cannot be told from 0." in words
    assert "The runs do not support a recommendation for loss." in words
    assert "The disk is full." in words
    assert "it diverged" in words
    assert "Runs differ in torch" in words


def test_a_page_fetches_and_runs_nothing(whole: tuple[Path, dict[str, Any]]) -> None:
    page = _Text(_page(whole[0]))
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)


def test_every_plot_of_a_page_is_also_a_png(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, said = whole
    names = {re.sub(r"^\d+-", "", Path(path).stem) for path in said["plots"]}
    kinds = ("parameters", "images", "flops", "isoflop", "frontier", "joint", "residuals", "rates")
    assert names == {
        *(f"knn-{kind}" for kind in (*kinds, "curves")),
        *(f"loss-{kind}" for kind in ("parameters", "images", "flops")),
    }
    assert len(_Text(_page(folder)).sources) == len(names)
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in said["plots"])


def test_json_holds_runs_answers_and_the_recommendation(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)  # NaN and infinity are no JSON

    folder, said = whole
    data = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert len(data["runs"]) == len(_rows())
    assert data["recommendation"] == said["recommendation"]
    assert data["recommendation"]["trust"] == data["answers"]["knn"]["budgets"][0]["trust"]
    assert data["answers"]["loss"]["budgets"] == []
    assert data["version_differences"]["torch"] == {"2.6.0": 14, "2.7.0": 1}


def test_the_preset_loads_as_the_recommended_run(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, said = whole
    config, found = load_config(str(folder / PRESET)), said["recommendation"]
    assert config.model.embed_dim == found["embed_dim"]
    assert config.model.num_heads is not None
    assert found["embed_dim"] == 32 * config.model.num_heads
    images = config.data.images_per_epoch
    assert images is not None
    assert images * config.train.epochs == found["images"]
    assert images % config.train.batch_size == 0
    assert config.train.epochs == 10
    assert config.train.stop_after_steps is None
    assert config.peak_lr == pytest.approx(found["lr"])
    assert config.run_dir == "runs/recommended"
    best = a_fit(_rows()).optima[1]
    assert found["parameters"] == pytest.approx(best.parameters.value, rel=0.1)
    spent = found["images"] * found["parameters"]
    assert spent == pytest.approx(best.images.value * best.parameters.value, rel=0.01)


def test_a_preset_says_where_it_comes_from(whole: tuple[Path, dict[str, Any]]) -> None:
    text = (whole[0] / PRESET).read_text()
    comments = " ".join(line[2:] for line in text.splitlines() if line.startswith("#"))
    best = a_fit(_rows()).optima[1]
    assert text.startswith(f"{MARK}\n")
    assert "by the joint approach (90 % intervals)" in comments
    assert interval(best.parameters) in comments
    assert "Trust: limited." in comments


def test_without_an_optimum_the_preset_of_an_earlier_report_goes(tmp_path: Path) -> None:
    rows = [a_row()]
    (tmp_path / PRESET).write_text(f"{MARK}\nseed: 0\n")
    said = write_report(rows, [no_fit(rows)], tmp_path)["recommendation"]
    assert not (tmp_path / PRESET).exists()
    assert said["removed_earlier"] is True
    assert said["preset"] is None
    assert "no metric has an optimum" in said["why_not"]
    words = _Text(_page(tmp_path)).words
    assert "The runs do not support a recommendation for knn." in words
    assert f"The best of 1 measured run is {rows[0].name}" in words
    assert "There is no recommended.yaml" in words


def test_a_preset_of_somebody_else_stays(tmp_path: Path) -> None:
    rows = [a_row()]
    (tmp_path / PRESET).write_text("seed: 3\n")
    said = write_report(rows, [no_fit(rows)], tmp_path)["recommendation"]
    assert said["removed_earlier"] is False
    assert (tmp_path / PRESET).read_text() == "seed: 3\n"
    bare = replace(no_fit(rows), optima=(an_optimum("joint", 1e12, 2.0),))
    with pytest.raises(ConfigError, match="not written by a report; move it away"):
        write_report(rows, [bare], tmp_path)


def test_names_of_any_letters_are_only_text(tmp_path: Path) -> None:
    rows = [
        replace(row, name=f"{ODD} {i}", metrics={f"_{ODD}": row.metrics["knn"]})
        for i, row in enumerate(grid(((64, 3),), seeds=1))
    ]
    rows[0] = replace(rows[0], status="failed", error=f"{ODD} {'word ' * 1000}")
    fit = replace(no_fit(rows, f"_{ODD}"), optima=(an_optimum("joint", 1e13, 2.0),))
    said = write_report(rows, [fit], tmp_path)
    page = _Text(_page(tmp_path))
    assert "script" not in page.tags
    assert "<script>alert(1)</script> $x_1$ \u6f22" in page.words
    assert load_config(str(tmp_path / PRESET)).run_dir == "runs/recommended"
    assert all(re.fullmatch(r"[-\w]+\.png", Path(path).name) for path in said["plots"])


@pytest.mark.parametrize("fits", [(), ("knn",)])
def test_a_sweep_whose_runs_all_failed_has_a_page(tmp_path: Path, fits: Sequence[str]) -> None:
    rows = [a_row(status="failed", metrics={}, curves=[], error="No GPU.")]
    said = write_report(rows, [no_fit(rows, name) for name in fits], tmp_path)
    assert said["plots"] == []
    words = _Text(_page(tmp_path)).words
    assert "No GPU." in words
    assert "0 runs done, 1 failed" in words


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report([], [], tmp_path / "file" / "report")


def test_the_narrower_approach_answers_and_joint_if_both_are_equal() -> None:
    wide, narrow = an_optimum("joint", 1e13, 2.0, share=0.5), an_optimum("isoflop", 1e13, 2.0)
    fit = a_fit(grid(seeds=1))
    assert conclusions(replace(fit, optima=(wide, narrow)))[0].optimum is narrow
    equal = an_optimum("joint", 1e13, 2.0)
    assert conclusions(replace(fit, optima=(narrow, equal)))[0].optimum is equal


@pytest.mark.parametrize(
    ("changes", "trust"),
    [
        ({}, Trust.GOOD),
        ({"num_runs": 9}, Trust.LIMITED),
        ({"num_runs": 5}, Trust.LOW),
        ({"cautions": ("Careful.",)}, Trust.LIMITED),
        ({"joint": ("r2", 0.9)}, Trust.LIMITED),
        ({"joint": ("r2", 0.5)}, Trust.LOW),
        ({"joint": ("left_out_error", -0.3)}, Trust.LOW),
        ({"joint": ("left_out_error", None)}, Trust.LIMITED),
        ({"optima": (an_optimum("joint", 1e15, 5.0),)}, Trust.LIMITED),
        ({"optima": (an_optimum("joint", 1e15, 50.0),)}, Trust.LOW),
        ({"optima": (an_optimum("joint", 1e15, 2.0, share=2.0),)}, Trust.LOW),
    ],
)
def test_trust_is_that_of_the_weakest_reason(changes: dict[str, Any], trust: Trust) -> None:
    fit = a_fit(grid(seeds=1))
    if "joint" in changes:
        assert fit.joint is not None
        changes = {"joint": replace(fit.joint, **dict([changes["joint"]]))}
    assert conclusions(replace(fit, **changes))[0].trust is trust


@pytest.mark.parametrize("end", ["low", "high"])
def test_an_optimum_without_bounds_is_no_answer(end: str) -> None:
    best = an_optimum("joint", 1e13, 2.0)
    open_end = replace(best.parameters, **{end: 0.0 if end == "low" else math.inf})
    fit = replace(a_fit(grid(seeds=1)), optima=(replace(best, parameters=open_end),))
    assert conclusions(fit) == []
    with pytest.raises(ConfigError, match="no metric has an optimum that the runs support"):
        recommend(grid(seeds=1), [fit])


def test_sizes_that_were_run_are_recommended_as_they_are() -> None:
    rows = grid(seeds=1)
    for row in rows:
        config = parse_config(row.config)
        size = nearest_size(rows, config, row, parameters=row.parameters)
        assert (size.embed_dim, size.depth, size.parameters) == (
            row.embed_dim,
            row.depth,
            row.parameters,
        )


@settings(max_examples=30)
@given(st.floats(5.5, 8.0))
def test_widths_are_whole_heads_and_sizes_near_what_is_asked_for(log10_n: float) -> None:
    rows = grid(((96, 4), (128, 6)), seeds=1)
    size = nearest_size(rows, parse_config(rows[0].config), rows[0], parameters=10**log10_n)
    assert size.embed_dim == 32 * size.num_heads
    assert size.parameters == pytest.approx(10**log10_n, rel=0.2)


def test_one_size_grows_in_width_alone() -> None:
    row = a_row(128, 6)
    size = nearest_size([row], parse_config(row.config), row, parameters=4 * row.parameters)
    assert (size.embed_dim, size.depth) == (256, 6)


def test_a_resnet_has_no_recommended_size() -> None:
    rows = [replace(a_row(), embed_dim=None, depth=None)]
    with pytest.raises(ConfigError, match="has no width and depth to scale"):
        recommend(rows, [replace(no_fit(rows), optima=(an_optimum("joint", 1e12, 2.0),))])


def test_settings_of_another_version_are_named(tmp_path: Path) -> None:
    rows = [replace(a_row(), config={"sead": 1})]
    fit = replace(no_fit(rows), optima=(an_optimum("joint", 1e12, 2.0),))
    said = write_report(rows, [fit], tmp_path)["recommendation"]
    assert "do not fit this version" in said["why_not"]
    assert "sead" in said["why_not"]


def test_rates_are_interpolated_over_sizes_and_of_the_same_batch() -> None:
    small, large = a_row(64, 3), a_row(192, 8)
    rows = [small, a_row(128, 6), large]
    rates = [
        replace(a_best_rate(row), optimum=around(lr)) for row, lr in ((small, 4e-3), (large, 1e-3))
    ]
    other = replace(rates[0], batch_size=512, optimum=around(9.0))
    fit = replace(no_fit(rows), optima=(an_optimum("joint", 1e13, 2.0),))
    found = recommend(rows, [replace(fit, best_rates=(*rates, other))])
    assert 1e-3 < found.lr < 4e-3
    alone = recommend(rows, [replace(fit, best_rates=(other,))])
    assert alone.lr == pytest.approx(rows[0].lr)
    assert alone.lr_from == f"run {alone.nearest}"


def test_the_rate_follows_size_and_length() -> None:
    """9.2e-4 was recommended where the law of the rates has a twentieth of it."""

    def law(row: Row) -> float:
        return float(1e-3 * (row.parameters / 1e5) ** -0.4 * (row.images / 1e5) ** -0.5)

    rows = [a_row(*shape, images=d) for shape in ((64, 3), (192, 8)) for d in (32_000, 320_000)]
    rates = [replace(a_best_rate(r), images=r.images, optimum=around(law(r))) for r in rows]
    optimum = an_optimum("joint", 1e15, 9.0)
    fit = replace(no_fit(rows), optima=(optimum,), best_rates=tuple(rates))
    found = recommend(rows, [fit])
    there = replace(rows[0], parameters=found.size.parameters, images=found.images)
    assert found.lr == pytest.approx(law(there), rel=0.02)
    one_length = [rate for rate in rates if rate.images == 32_000]
    found = recommend(rows, [replace(fit, best_rates=tuple(one_length))])
    assert "and one number of images only: check it" in found.lr_from


def test_a_preset_keeps_the_rules_of_the_sweep_and_looks_for_its_micro_batch() -> None:
    rules = {"lr": {"width": -1.0}, "weight_decay": {"images": 0.5}, "warmup": {"fraction": 0.2}}
    rows = [replace(a_row(), rules=rules)]
    fit = replace(no_fit(rows), optima=(an_optimum("joint", 1e15, 9.0),))
    found = recommend(rows, [fit])
    config = parse_config(yaml.safe_load(found.preset))
    before = parse_config(rows[0].config)
    wider = found.size.embed_dim / 64
    assert wider > 1
    assert config.optim.lr == pytest.approx(before.optim.lr / wider)
    longer = found.images / rows[0].images
    decay = before.optim.weight_decay * longer**0.5
    assert config.optim.weight_decay == pytest.approx(decay, rel=0.01)
    assert config.optim.warmup_epochs == 2
    assert config.train.micro_batch_size == "auto"
    assert "optim.lr, optim.warmup_epochs, optim.weight_decay" in _unwrapped(found.preset)
    alone = recommend([a_row()], [fit])
    assert "The table holds no rules of the sweep" in _unwrapped(alone.preset)


def _unwrapped(preset: str) -> str:
    return " ".join(line[2:] for line in preset.splitlines() if line.startswith("#"))


def test_runs_to_add_name_what_is_missing() -> None:
    rows = [a_row(), a_row(images=128_000), a_row(seed=1, status="failed", metrics={})]
    fit = a_fit(grid(seeds=1), best_rates=(a_best_rate(rows[0], optimum=False),))
    edge = replace(fit.isoflops[0], y=fit.isoflops[0].parameters[::-1], optimum=None)
    said = " ".join(runs_to_add(rows, replace(fit, isoflops=(edge,))))
    for part in (
        "1 run failed",
        "3 model sizes",
        "3 numbers of images",
        "other seeds",
        "larger models",
    ):
        assert part in said
    assert "Try higher learning rates for 64 x 3" in said


def test_a_run_far_from_the_law_is_named() -> None:
    rows = grid(seeds=1)
    assert outliers(a_fit(rows)) == {}
    rows[3] = replace(rows[3], metrics={"knn": 2 * (rows[3].metrics["knn"] or 0)})
    assert list(outliers(a_fit(rows))) == [rows[3].name]


def test_equal_versions_are_no_difference() -> None:
    assert version_differences(grid(((64, 3),))) == {}


def test_only_plots_with_data_are_drawn() -> None:
    one = [a_row(curves=[])]
    assert draw_metric(one, no_fit(one)) == {}
    assert draw_metric([], no_fit([])) == {}
    zero = [a_row(images=images, metrics={"knn": 0.0}, curves=[]) for images in (6400, 64_000)]
    assert set(draw_metric(zero, no_fit(zero))) == {"images", "flops"}


def test_intervals_without_ends_are_drawn() -> None:
    rows = grid(((64, 3), (96, 4)), seeds=1)
    fit = a_fit(rows)
    nothing = Interval(0.3, 0.0, math.inf)
    endless = Optimum("joint", 1e13, around(1e6), around(1e6), nothing, 2.0)

    law = fit.laws["flops"]

    fit = replace(
        fit,
        laws={
            "flops": replace(law, band=lambda x: replace(law.band(x), low=0 * x, high=x * math.inf))
        },
        joint=None,
        isoflops=(),
        frontiers=(),
        optima=(endless,),
    )
    drawn = draw_metric([replace(row, curves=[]) for row in rows], fit)
    assert set(drawn) == {"parameters", "images", "flops"}
    assert ElementTree.fromstring(drawn["flops"].svg).tag.endswith("svg")


@given(st.floats(-6, 20), st.floats(0.005, 12))
def test_ticks_are_few_lie_on_the_axis_and_differ(log10_low: float, decades: float) -> None:
    low, high = 10**log10_low, 10 ** (log10_low + decades)
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)
    assert len(set(tick_labels(ticks))) == len(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.3, "0.3"), (64, "64"), (512, "512"), (999.6, "1 k"), (40_000, "40 k"),
        (1_234_567, "1.23 M"), (4.12e14, "412 T"), (1e30, "1e+30"), (5e-4, "0.0005"),
        (-0.02, "-0.02"), (None, "-"), (math.nan, "-"), (math.inf, "-"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_percents_are_short() -> None:
    found = [percent(share, sign=True) for share in (0.9992, 0.021, -0.3, 0.0, 3.2)]
    assert found == ["+99.9 %", "+2.1 %", "-30 %", "0 %", "+320 %"]


def test_an_interval_says_which_ends_it_has() -> None:
    assert interval(Interval(1.2e6, 9e5, 1.6e6)) == "1.20 M (900 k to 1.60 M)"
    assert interval(Interval(0.3, 0.0, 0.4)) == "0.300 (at most 0.400)"
    assert interval(Interval(0.3, 0.2, math.inf)) == "0.300 (at least 0.200)"
    assert interval(Interval(0.3, -math.inf, math.inf)) == "0.300 (no bounds)"
