"""Classes and depths of pixels: shared columns, resumed trainings, images in both sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale.convert.weights_file import save_backbone
from dinoscale.data.decoding.decode import UnavailableSampleError
from dinoscale.data.sources.source import open_source
from dinoscale.errors import ConfigError
from dinoscale.evaluate import overlap
from dinoscale.evaluate.dense_probes.linear_head import Recipe
from dinoscale.evaluate.dense_probes.probe import ProbeOptions
from dinoscale.evaluate.dense_probes.target_files import Part
from dinoscale.evaluate.depth.depth import DepthProtocol, evaluate_depth
from dinoscale.evaluate.discovery.discover import evaluate_discover
from dinoscale.evaluate.discovery.truth import Annotations
from dinoscale.evaluate.frozen_backbone import LoadOptions
from dinoscale.evaluate.segmentation.index_masks import VOID, MaskRule
from dinoscale.evaluate.segmentation.layouts import Layout
from dinoscale.evaluate.segmentation.protocols import Knn, Linear
from dinoscale.evaluate.segmentation.segmentation import evaluate_segmentation
from dinoscale.models.zoo import build_backbone
from dinoscale.reports.comparison.scores import Outcome, compare
from tests.unit.evaluate.tiny_files import CARD, SHAPE, save_picture, save_weights

OPTIONS = ProbeOptions(num_workers=0, batch_size=4, progress=False)
KNN = Knn(size=24, k=2)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """One train and one test image of two classes."""
    mask = np.zeros((24, 24), np.uint8)
    mask[:, 12:] = 1
    parts = []
    for seed, name in enumerate(("train", "test")):
        save_picture(tmp_path / name / "a.png", seed=seed, size=(24, 24))
        masks = tmp_path / f"{name}-masks"
        masks.mkdir()
        Image.fromarray(mask).save(masks / "a.png")
        parts.append(Part(str(tmp_path / name), str(masks)))
    return Layout(*parts)


def _num_columns(reports: list[dict[str, Any]]) -> int:
    outcomes = [
        Outcome(str(number), "teacher", str(report["task"]), "", report)
        for number, report in enumerate(reports)
    ]
    return len(compare(outcomes).columns)


def test_networks_of_different_depth_share_a_column(layout: Layout, tmp_path: Path) -> None:
    deep = replace(SHAPE, depth=2)
    torch.manual_seed(2)
    network = build_backbone(**vars(deep)).state_dict()
    save_backbone(tmp_path / "deep.safetensors", network, replace(CARD, backbone=deep))
    files = (save_weights(tmp_path / "w.safetensors"), tmp_path / "deep.safetensors")
    reports = [evaluate_segmentation(file, layout, protocol=KNN, options=OPTIONS) for file in files]
    assert [report["blocks"] for report in reports] == [[0], [1]]
    assert _num_columns(reports) == 1


def test_numbers_of_classes_are_columns(layout: Layout, tmp_path: Path) -> None:
    weights = save_weights(tmp_path / "w.safetensors")
    rules = [MaskRule(), MaskRule(num_classes=9)]
    reports = [
        evaluate_segmentation(weights, replace(layout, rule=rule), protocol=KNN, options=OPTIONS)
        for rule in rules
    ]
    assert _num_columns(reports) == 2


def test_indexed_masks_are_a_column_of_discover(layout: Layout, tmp_path: Path) -> None:
    folder = Path(layout.train.targets or "")
    for file in folder.iterdir():
        Image.fromarray(np.uint8(200 * (np.asarray(Image.open(file)) > 0))).save(file)
    weights = save_weights(tmp_path / "w.safetensors")
    loading = LoadOptions(progress=False)
    reports = []
    for indexed in (False, True):
        truth = Annotations(str(folder), indexed=indexed)
        found = evaluate_discover(
            weights, layout.train.images, annotations=truth, size=24, options=loading
        )
        reports.append(found)
    assert _num_columns(reports) == 2


CLASSES_0_TO_4 = MaskRule(num_classes=5)
SWAPPED = MaskRule(renumber=(1, 0, *[VOID] * 254), num_classes=2)
NAMED = ("left", "right")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rule": CLASSES_0_TO_4}, "made_for.outputs"),
        ({"rule": SWAPPED}, "masks.renumber"),
        ({"class_names": NAMED}, "made_for.classes"),
    ],
)
def test_a_training_of_other_classes_does_not_go_on(
    layout: Layout,
    tmp_path: Path,
    end_after: Callable[[int | None], None],
    change: dict[str, Any],
    named: str,
) -> None:
    weights = save_weights(tmp_path / "w.safetensors")
    recipe = Recipe(iterations=1, batch_size=1, lr=1e-3, weight_decay=0.0, warmup=0.0)
    linear = Linear(size=24, crop=24, stride=24, recipe=recipe)
    options = replace(OPTIONS, out=tmp_path / "head.safetensors")
    end_after(1)
    with pytest.raises(KeyboardInterrupt):
        evaluate_segmentation(weights, layout, protocol=linear, options=options)
    end_after(None)
    with pytest.raises(ConfigError, match=rf"belongs to another training \(.*{named}.* changed"):
        evaluate_segmentation(weights, replace(layout, **change), protocol=linear, options=options)


def test_depth_warns_of_test_images_that_it_learnt_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = save_picture(tmp_path / "train" / "a.png", seed=0, size=(24, 24))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.png").write_bytes(picture.read_bytes())
    depths = tmp_path / "depths"
    depths.mkdir()
    for name in "ab":
        Image.fromarray(np.full((24, 24), 2000, np.uint16)).save(depths / f"{name}.png")
    parts = [Part(str(tmp_path / name), str(depths)) for name in ("train", "test")]
    recipe = Recipe(iterations=1, batch_size=1, lr=1e-3, weight_decay=0.0, warmup=0.0)
    protocol = DepthProtocol(crop=(24, 24), bins=4, recipe=recipe)
    with caplog.at_level("WARNING"):
        evaluate_depth(
            save_weights(tmp_path / "w.safetensors"), *parts, protocol=protocol, options=OPTIONS
        )
    assert "1 of the 1 pictures of test that were looked for are in train" in caplog.text

    def stale(path: str) -> bytes:
        raise UnavailableSampleError(path, "cannot be read: Stale file handle")

    monkeypatch.setattr(overlap, "read_image_file", stale)
    train, test = (open_source(part.images) for part in parts)
    assert overlap.find_overlap(test, train).looked_for == 0
    assert "not searched for pictures that both have" in caplog.text
