"""Which reports of classes and depths of pixels share a column, and which trainings go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale.convert.weights_file import save_backbone
from dinoscale.evaluate.dense_probes.probe import ProbeOptions
from dinoscale.evaluate.dense_probes.target_files import Part
from dinoscale.evaluate.segmentation.layouts import Layout
from dinoscale.evaluate.segmentation.protocols import Knn
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
