"""The estimated cost of a sweep."""

import json
from pathlib import Path
from typing import Any

import pytest

from dinoscale.config import load_config
from dinoscale.config.sweep.file import load_sweep
from dinoscale.errors import ConfigError
from dinoscale.planning.plan.report import make_plan as plan_one
from dinoscale.scaling.design.cost import _wall_hours, as_text, make_plan
from dinoscale.scaling.design.expand import expand_sweep
from tests.unit.sweep.files import MODELS, NO_SUCH_SET, sweep_of

SWEEPS = sorted((Path(__file__).parents[3] / "configs" / "sweep").glob("*.yaml"))
GRID = f"axes: {{model: {MODELS}, images: [3200, 6400]}}\n"


def _plan(folder: Path, text: str) -> dict[str, Any]:
    sweep = sweep_of(folder, text)
    return make_plan(sweep, expand_sweep(sweep))


def test_totals_are_sums_of_the_runs(tmp_path: Path) -> None:
    plan = _plan(tmp_path, GRID + "cost: {flops_per_s: 1e9}\nexecutor: {processes: 2, parallel: 2}")
    runs, totals = plan["runs"], plan["totals"]
    assert totals["runs"] == len(runs) == 4
    assert totals["flops"] == sum(run["images"] * run["flops_per_image"] for run in runs)
    assert totals["images"] == 2 * (3200 + 6400)
    hours = [run["hours"] for run in runs]
    assert hours == [run["flops"] / 1e9 / 2 / 3600 for run in runs]
    assert totals["rank_hours"] == pytest.approx(2 * sum(hours))
    assert max(hours) < totals["hours"] < sum(hours)


def test_runs_begin_in_their_order_as_soon_as_there_is_room() -> None:
    assert _wall_hours([1, 2, 3, 4], parallel=1) == 10
    assert _wall_hours([1, 2, 3, 4], parallel=2) == 6
    assert _wall_hours([1, 2], parallel=5) == 2


def test_fewer_images_may_be_seen_than_there_are_different_ones(tmp_path: Path) -> None:
    (run,) = _plan(tmp_path, "axes: {subset_size: [1.0], images: [1600]}")["runs"]
    assert (run["images"], run["distinct_images"]) == (1600, 1600)
    (run,) = _plan(
        tmp_path, "settings: {train.epochs: 5}\naxes: {subset_size: [1600], images: [640]}"
    )["runs"]
    assert (run["images"], run["distinct_images"]) == (640, 640)


def test_without_a_device_there_are_no_hours(tmp_path: Path) -> None:
    plan = _plan(tmp_path, GRID)
    assert {run["hours"] for run in plan["runs"]} == {None}
    assert (plan["totals"]["hours"], plan["totals"]["rank_hours"]) == (None, None)
    assert "no hours: set cost.gpu" in as_text(plan)


def test_memory_and_hours_are_those_of_the_plan_of_one_run(tmp_path: Path) -> None:
    text = "settings: {engine.zero_stage: 1}\naxes: {images: [40_000]}\ncost: {gpu: a100}\n"
    (run,) = _plan(tmp_path, text + "executor: {processes: 2}")["runs"]
    overrides = ["engine.zero_stage=1", "data.images_per_epoch=1600"]
    alone = plan_one(
        load_config("quickstart", overrides),
        gpus=2,
        gpu="a100",
        gpu_memory=None,
        utilization=0.4,
        network=None,
        node_gpus=8,
        storage=1.0,
    )["configured"]
    assert run["memory_bytes"] == alone["needed_bytes"]
    assert run["micro_batch_size"] == alone["micro_batch_size"] == 32
    assert run["hours"] == pytest.approx(alone["hours"], abs=0.005)


def test_an_automatic_micro_batch_is_the_largest_that_fits(tmp_path: Path) -> None:
    text = "settings: {train.micro_batch_size: auto}\n" + GRID
    large = _plan(tmp_path, text + "cost: {gpu: h100}")["runs"]
    small = _plan(tmp_path, text + "cost: {gpu: h100, gpu_memory: 1550MB}")["runs"]
    assert {run["micro_batch_size"] for run in large} == {64}
    assert max(run["micro_batch_size"] for run in small) < 64
    assert {run["micro_batch_size"] for run in _plan(tmp_path, text)["runs"]} == {None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cost: {gpu: h100, gpu_memory: 1545MB}",
            r"^run 32x2-img3200-\w+: needs 1.55 GB with a micro-batch of 32, but a h100 has 1.545"
            " GB; set train.micro_batch_size: ",
        ),
        ("cost: {gpu: h100, gpu_memory: 1GB}", "nothing fits: choose a larger GPU"),
        ("cost: {gpu: h1000}", "cost.gpu: 'h1000' is unknown; known are a10,"),
        ("cost: {gpu: h100, gpu_memory: much}", "cost.gpu_memory: need a size such as 80GB"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan(tmp_path, GRID + text)


def test_runs_beyond_the_time_of_a_job_are_counted(tmp_path: Path) -> None:
    text = GRID + "cost: {flops_per_s: 1e6}\nexecutor: {kind: slurm, slurm: {hours: 60}}"
    told = _plan(tmp_path, text)["assumptions"]
    hours = [run["hours"] for run in _plan(tmp_path, text)["runs"]]
    longer = sum(each > 60 for each in hours)
    assert 0 < longer < 4
    assert f"{longer} of the runs take longer than the 60 h of executor.slurm.hours" in told


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweep_has_a_plan_without_its_data(path: Path) -> None:
    sweep = load_sweep(path)
    plan = make_plan(sweep, expand_sweep(sweep))
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    assert len(plan["runs"]) >= 9
    assert plan["totals"]["hours"] > 0
    assert not any("a minimum needs" in note for note in plan["assumptions"])
    text = as_text(plan)
    assert max(map(len, text.splitlines())) <= 115
    for run in plan["runs"]:
        assert run["name"] in text


def test_text_names_what_is_left_out_and_assumed(tmp_path: Path) -> None:
    text = NO_SUCH_SET + f"design: isoflop\naxes: {{model: {MODELS}, flops: [2e11, 1e12]}}\n"
    plan = as_text(_plan(tmp_path, text + "isoflop: {min_images: 5000}"))
    assert "left out:\n  64x2-c2e11: 2.49 k images, fewer than min_images, 5,000\n" in plan
    assert "data.train cannot be opened here" in plan
