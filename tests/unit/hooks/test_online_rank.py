"""Which runs measure RankMe of their training images, and of which of these."""

import json
import logging
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from dinoscale.checkpoint.progress import Progress
from dinoscale.config import list_presets, load_config
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.sources.mixture import open_sources
from dinoscale.data.sources.source import open_source
from dinoscale.data.sources.subset import SubsetSource
from dinoscale.errors import DataError
from dinoscale.evaluate.features import extract_unlabelled
from dinoscale.reports.run.plots import draw_run
from dinoscale.reports.run.read import read_record
from dinoscale.reports.run.state import find_state
from dinoscale.training.due import Due
from dinoscale.training.hooks.measurements import Measurements
from dinoscale.training.hooks.metrics import Metrics
from dinoscale.training.hooks.online_rank import OnlineRank, as_in_run, of_spectrum, online_rank
from tests.distributed.tiny_run import tiny_config

SPEC = "synthetic:shapes?images=24&size=16"
OTHER = "synthetic:shapes?images=9&size=16&seed=3"
LABELLED = {"train": SPEC, "test": OTHER}


class Pooled(nn.Module):
    """The mean of each channel in each quarter of an image, (N, 12)."""

    embed_dim = 12

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(crops[0], 2).flatten(1)


def _measure(measured: OnlineRank | None) -> dict[str, float]:
    assert measured is not None
    return measured.measure(Pooled(), torch.device("cpu"), lambda: None)


@pytest.mark.parametrize(
    ("specs", "subset", "images", "chosen"),
    [
        ([SPEC], None, 10, 10),
        ([SPEC], None, 100, 24),  # all there are
        ([SPEC, OTHER], None, 10, 10),  # of the first
        ([SPEC], 15, 10, 10),
        ([SPEC], 7, 10, 7),  # none that is not trained on
    ],
)
def test_images_are_those_that_evaluate_rank_chooses(
    specs: list[str], subset: int | None, images: int, chosen: int
) -> None:
    config = tiny_config(eval={"rank_images": images, "crop": 16, "resize": 16})
    found = _measure(online_rank(config, open_sources(specs, subset_size=subset)))
    whole = open_source(SPEC)
    source = whole if chosen == len(whole) else SubsetSource(whole, images=chosen)
    prepared = as_in_run(config, torch.device("cpu"), lambda: None)
    features, _ = extract_unlabelled(Pooled(), source, **prepared)
    assert found == {**of_spectrum(features), "rank_images": chosen}
    assert 1 < found["rankme"] < min(chosen, 12)
    assert "alpha_req" not in found  # of 12 directions


def test_the_plot_says_of_how_many_images_the_rank_is(tmp_path: Path) -> None:
    own, of_knn = {"step": 0, "rankme": 3.0, "rank_images": 512}, {"step": 4, "rankme": 700.0}
    for name, lines in (("run", [own]), ("older", [of_knn]), ("since", [own, of_knn])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        record = read_record(tmp_path / name)
        ((drawn, plot),) = draw_run(record, find_state(record, now=0.0))
        assert drawn == "rankme"
        assert ("at most 512" in plot.caption) == (name == "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"eval": {"rank_images": 0}},
        {"eval": {"rank_images": 10, **LABELLED}},
        {"eval": {"rank_images": 10}, "guard": {"every_steps": 5, "images": SPEC}},
    ],
)
def test_what_is_measured_otherwise_is_not_measured_twice(changes: dict[str, Any]) -> None:
    assert online_rank(tiny_config(**changes), open_source(SPEC)) is None


def test_streamed_images_are_left_out_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    source = StreamSource(["https://nowhere/a.tar"], [24], block_size=8)
    config = tiny_config(eval={"rank_images": 10})
    with caplog.at_level(logging.INFO):
        assert online_rank(config, source) is None
    (line,) = caplog.messages
    assert "training images are streamed (eval.rank_images)" in line


def test_images_of_which_none_can_be_read_cost_the_measurement(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    config = tiny_config(eval={"rank_images": 2, "crop": 16, "resize": 16})
    with pytest.raises(DataError, match="none of 2 training images can be read"):
        _measure(online_rank(config, open_source(str(tmp_path))))


@pytest.mark.parametrize("due_now", [True, False])
@pytest.mark.parametrize("written", [True, False])
def test_a_start_measures_only_what_the_start_before_left_out(due_now: bool, written: bool) -> None:
    metrics = MagicMock()
    metrics.has.return_value = written
    measurements = Measurements(
        *(tiny_config(), MagicMock(), None, None, MagicMock(), metrics),
        warns=False,
        online_rank=MagicMock(),
    )
    due = Due(log=True, knn=due_now, guard=False, save=True)
    # An accuracy of a start that had labels says nothing about the rank.
    for accuracy in (None, 50.0):
        progress = Progress(step=4, knn_top1=accuracy)
        assert measurements.missing(progress, due).knn == (due_now and not written)


def test_all_presets_but_the_largest_measure_it() -> None:
    images = {name: load_config(name).eval.rank_images for name in list_presets()}
    assert images.pop("dinov3_vit7b16") == 0
    assert set(images.values()) == {512}


def test_metrics_know_what_a_step_has(tmp_path: Path) -> None:
    def metrics(*, active: bool) -> Metrics:
        of_run = {"start_step": 4, "total_steps": 8, "wandb_project": None, "config": {}}
        return Metrics(tmp_path, active=active, **of_run)

    written = metrics(active=True)
    assert not written.has(4, "rankme")
    written.write(4, {"rankme": 3.0})
    written.write(4, {"loss": 1.0})
    assert written.has(4, "rankme")
    assert written.has(4, "loss")
    assert not written.has(3, "rankme")
    assert not metrics(active=False).has(4, "rankme")
