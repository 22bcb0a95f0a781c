"""Kept heads of pixels: judged as after their training, by the weights of their training alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dinoscale import cli
from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.evaluate.dense_probes.linear_head import Recipe
from dinoscale.evaluate.dense_probes.probe import ProbeOptions
from dinoscale.evaluate.dense_probes.target_files import Part
from dinoscale.evaluate.depth.depth import evaluate_depth
from dinoscale.evaluate.depth.depth_files import DepthRange
from dinoscale.evaluate.depth.kept import evaluate_depth_head
from dinoscale.evaluate.depth.protocol import DepthProtocol
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.evaluate.segmentation.index_masks import MaskRule
from dinoscale.evaluate.segmentation.kept import evaluate_segmentation_head
from dinoscale.evaluate.segmentation.layouts import Layout
from dinoscale.evaluate.segmentation.protocols import Linear
from dinoscale.evaluate.segmentation.segmentation import evaluate_segmentation
from dinoscale.models.zoo import build_backbone

SHAPE = BackboneShape(
    "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=1
)
OPTIONS = ExtractionOptions(num_workers=0, batch_size=3, progress=False)
READING = ["--num-workers", "0", "--batch-size", "3"]
RECIPE = Recipe(8, 2, lr=0.05, weight_decay=0.01, warmup=0.25, clip=5.0)
# None of their settings is a default.
SEGMENTATION = Linear(size=27, crop=21, stride=13, ratio=(0.8, 1.2), recipe=RECIPE)
DEPTH = DepthProtocol(
    *(500.0, DepthRange(0.5, 8.0), 12, 25, (16, 24)), eigen_crop=True, recipe=RECIPE
)

Judge = Callable[..., dict[str, Any]]


def _save_weights(path: Path, *, seed: int = 1, mean: float = 0.5, num_heads: int = 1) -> Path:
    torch.manual_seed(seed)
    shape = replace(SHAPE, num_heads=num_heads)
    card = BackboneCard(shape, (mean,) * 3, (0.25,) * 3, resize=16, crop=16, source="test")
    save_backbone(path, build_backbone(**vars(SHAPE)).state_dict(), card)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, two sets of noise with masks (0 is void) and depths, and a head of each task."""
    place = tmp_path_factory.mktemp("heads")
    _save_weights(place / "w.safetensors")
    rng = np.random.default_rng(0)
    for name, number in (("train", 3), ("test", 2)):
        for folder in (name, f"{name}-masks", f"{name}-depths"):
            (place / folder).mkdir()
        for image in range(number):
            pixels = rng.integers(0, 256, (30, 34, 3), np.uint8)
            classes = rng.integers(0, 4, (30, 34), np.uint8)
            depths = rng.integers(1, 4500, (30, 34), np.uint16)
            for folder, made in ((name, pixels), ("masks", classes), ("depths", depths)):
                folder = name if folder == name else f"{name}-{folder}"
                Image.fromarray(made).save(place / folder / f"{image}.png")
    return place


def _parts(place: Path, kind: str) -> list[Part]:
    return [Part(str(place / name), str(place / f"{name}-{kind}")) for name in ("train", "test")]


@pytest.fixture(scope="module")
def segmentation(place: Path) -> dict[str, Any]:
    return evaluate_segmentation(
        *(place / "w.safetensors", Layout(*_parts(place, "masks"), MaskRule(ignore_zero=True))),
        protocol=SEGMENTATION,
        options=ProbeOptions(**vars(OPTIONS), layers=2, seed=3, out=place / "masks.safetensors"),
    )


@pytest.fixture(scope="module")
def depth(place: Path) -> dict[str, Any]:
    return evaluate_depth(
        *(place / "w.safetensors", *_parts(place, "depths")),
        protocol=DEPTH,
        options=ProbeOptions(**vars(OPTIONS), layers=2, seed=3, out=place / "depths.safetensors"),
    )


def _judging(place: Path, kind: str) -> list[str]:
    """The command that judges a head by its own test set."""
    task = {"masks": "segmentation", "depths": "depth"}[kind]
    test = ["--test", str(place / "test"), f"--test-{kind}", str(place / f"test-{kind}")]
    head = ["--head", str(place / f"{kind}.safetensors")]
    return ["evaluate", task, str(place / "w.safetensors"), *head, *test, *READING]


@pytest.mark.parametrize("kind", ["masks", "depths"])
def test_report_is_that_of_the_training(
    kind: str, place: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = request.getfixturevalue("segmentation" if kind == "masks" else "depth")
    cli.run(_judging(place, kind))
    judged = json.loads(capsys.readouterr().out)
    assert {"weights", "test", f"test_{kind}", "head"} == judged.pop("made_from")["input"].keys()
    assert judged.pop("head") == trained["out"]
    assert judged == json.loads(json.dumps({k: v for k, v in trained.items() if k != "out"}))


@pytest.mark.usefixtures("segmentation")
def test_compare_shows_pictures(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, task, weights, *words = _judging(place, "masks")
    line = shlex.join([task, *words])
    cli.run(["evaluate", "compare", weights, "--out", str(tmp_path), "--task", line])
    assert not json.loads(capsys.readouterr().out)["failed"]
    assert len([*tmp_path.glob("results/*/segmentation-sheet.png")]) == 1
    assert "<img" in (tmp_path / "compare.html").read_text()


@pytest.mark.usefixtures("segmentation", "depth")
def test_settings_beside_a_head_are_refused(place: Path) -> None:
    for kind, more in (
        ("masks", ["--seed", "0"]),
        ("masks", ["--protocol", "knn"]),
        ("masks", ["--layers", "1"]),
        ("masks", ["--ignore-zero"]),
        ("masks", ["--train-masks", "x"]),
        ("depths", ["--depth-scale", "1000"]),
        ("depths", ["--untrained"]),
        ("depths", ["--out", "x"]),
    ):
        with pytest.raises(ConfigError, match=f"^{more[0]}: --head has the settings of its"):
            cli.run([*_judging(place, kind), *more])
    words = _judging(place, "masks")
    with pytest.raises(ConfigError, match="--head: name the set to judge it by, --test"):
        cli.run(words[: words.index("--test")])
    with pytest.raises(ConfigError, match="--data: its val part is the test set"):
        cli.run([*words, "--data", "VOC2012"])


@pytest.mark.usefixtures("segmentation", "depth")
@pytest.mark.parametrize(
    ("judge", "kind", "other"),
    [
        (evaluate_segmentation_head, "masks", "depths"),
        (evaluate_depth_head, "depths", "masks"),
    ],
)
def test_only_its_own_weights_judge(
    judge: Judge, kind: str, other: str, place: Path, tmp_path: Path
) -> None:
    weights, head, test = place / "w.safetensors", place / kind, _parts(place, kind)[1]
    head = head.with_suffix(".safetensors")
    others = _save_weights(tmp_path / "others.safetensors", seed=2)
    prepared = _save_weights(tmp_path / "prepared.safetensors", mean=0.4, num_heads=2)
    for words, match in (
        ((others, head), "was trained on features of other weights than .*others"),
        ((prepared, head), "was trained with another num_heads, mean than .*prepared"),
        ((weights, weights), "w.safetensors is no kept head: name a file that `evaluate"),
        ((weights, tmp_path / "missing"), "missing is no kept head"),
        ((weights, place / f"{other}.safetensors"), "was kept by `evaluate .*, not by"),
        ((weights, _without(head, "train", tmp_path)), "its card is incomplete. Train"),
        ((weights, _without(head, "backbone", tmp_path)), "is no kept head"),
    ):
        with pytest.raises(CheckpointError, match=match):
            judge(*words, test, options=OPTIONS)


def _without(head: Path, key: str, folder: Path) -> Path:
    """A copy of a head whose card lacks something."""
    with safe_open(head, framework="pt") as file:
        card = json.loads(file.metadata()["head"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del card[key]
    path = folder / f"without-{key}.safetensors"
    save_file(state, path, {"head": json.dumps(card)})
    return path


@pytest.mark.usefixtures("segmentation")
def test_masks_of_other_classes_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="was trained on other classes than those of --data"):
        evaluate_segmentation_head(
            *(place / "w.safetensors", place / "masks.safetensors", _parts(place, "masks")[1]),
            rule=MaskRule(num_classes=21),
            options=OPTIONS,
        )
