"""LiDAR of the guard: that of `evaluate rank` of the same weights, and how it decides."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinoscale.checkpoint.progress import Guarded
from dinoscale.config.sections.guard import GuardConfig
from dinoscale.convert.weights_file import load_backbone
from dinoscale.data.sources.source import open_source
from dinoscale.errors import ConfigError
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.evaluate.label_free.rank import Samples, evaluate_rank
from dinoscale.training.hooks.guard import judge
from dinoscale.training.hooks.held_out import HeldOut
from tests.distributed.tiny_run import tiny_config
from tests.unit.evaluate.tiny_files import CARD, save_weights

SPEC = "synthetic:shapes?images=14&size=40"
IMAGES, VIEWS = 12, 3


def _held_out(folder: Path, **guard: Any) -> HeldOut:
    config = tiny_config(
        str(folder),
        guard={"every_steps": 5, "images": SPEC, "num_images": IMAGES, **guard},
        eval={"resize": CARD.resize, "crop": CARD.crop, "batch_size": 8},
        data={"mean": list(CARD.mean), "std": list(CARD.std), "num_workers": 0},
    )
    return HeldOut(config, lambda name, decoder: open_source(name, decoder))


def _measure(held_out: HeldOut, backbone: nn.Module) -> dict[str, float]:
    return held_out.measure(backbone, torch.device("cpu"), lambda: None, starts=True)


def test_lidar_of_the_guard_is_that_of_evaluate_rank_and_the_same_every_time(
    tmp_path: Path,
) -> None:
    weights = save_weights(tmp_path / "weights.safetensors")
    options = ExtractionOptions(num_workers=0, progress=False, cache=False, batch_size=8)
    samples = Samples(images=IMAGES, lidar_images=IMAGES, views=VIEWS)
    score = evaluate_rank(weights, SPEC, samples=samples, options=options)["score"]
    backbone, _ = load_backbone(weights)
    held_out = _held_out(tmp_path, lidar_views=VIEWS)
    found = _measure(held_out, backbone)
    assert {name: found[name] for name in ("rankme", "lidar")} == score
    assert 1 < found["lidar"] < IMAGES
    assert _measure(held_out, backbone) == found
    without = _measure(_held_out(tmp_path), backbone)
    assert found["lidar_views"] == VIEWS
    assert without == {name: value for name, value in found.items() if "lidar" not in name}


def test_features_that_are_not_finite_have_no_lidar(tmp_path: Path) -> None:
    backbone, _ = load_backbone(save_weights(tmp_path / "weights.safetensors"))
    nn.init.constant_(next(backbone.parameters()), torch.nan)
    found = _measure(_held_out(tmp_path, lidar_views=VIEWS), backbone)
    assert found == {"rankme": 0.0, "agreement": 0.0, "lidar": 0.0, "lidar_views": VIEWS}


def test_lidar_may_decide_and_then_other_views_do_not_compare(tmp_path: Path) -> None:
    rule = GuardConfig(every_steps=10, measure="lidar", lidar_views=VIEWS)
    known: Guarded | None = None
    for step, value in ((0, 5.0), (10, 9.0), (20, 8.0)):
        values = {"rankme": 30.0 + step, "lidar": value}
        known = judge(known, rule, step=step, values=values, images="a")
    assert known is not None
    assert known.fall.startswith("its LiDAR is 8, 11% below the best so far, 9 at step 10")
    by_lidar = [_held_out(tmp_path, measure="lidar", lidar_views=views) for views in (2, 3)]
    by_rank = [_held_out(tmp_path, lidar_views=views) for views in (2, 3)]
    assert len({one.identity for one in (*by_lidar, *by_rank)}) == 3


def test_lidar_of_other_views_does_not_stand_beside_that_of_these() -> None:
    rule = GuardConfig(every_steps=10, lidar_views=VIEWS, max_fall=0.5)
    known: Guarded | None = None
    for step, views in enumerate((2, 2, 0, 2)):
        of_views = {"lidar": 5.0, "lidar_views": views} if views else {}
        values = {"rankme": 30.0 - step, **of_views}
        known = judge(known, rule, step=step, values=values, images="a", identity="one")
    assert known is not None
    assert (known.start["lidar"], known.best["lidar"], known.best_step) == (5.0, 5.0, 0)
    values = {"rankme": 26.0, "lidar": 7.0, "lidar_views": 3}
    known = judge(known, rule, step=4, values=values, images="a", identity="one")
    assert known.start == known.best == {"rankme": 30.0}
    assert known.values == values


@pytest.mark.parametrize(
    ("guard", "text"),
    [
        ({"lidar_views": 1}, r"guard\.lidar_views: .*need 2 or more, or 0 for none; got 1"),
        ({"lidar_views": 65, "num_images": 2048}, r"are 133120 views, need 131072 or fewer: lower"),
        ({"measure": "lidar"}, r"guard\.measure: 'lidar' needs views .* guard\.lidar_views 2"),
    ],
)
def test_views_that_lidar_cannot_compare_are_refused(guard: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny_config(guard={"every_steps": 5, "images": SPEC, **guard})
