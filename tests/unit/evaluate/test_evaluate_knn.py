"""k-NN end to end: folders and a weights file in, a JSON report out."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.errors import CheckpointError, ConfigError, DataError
from dinoscale.evaluate.classification.knn import evaluate_knn
from dinoscale.evaluate.classification.labelled_sets import renumber_classes
from dinoscale.evaluate.frozen_backbone import ExtractionOptions, load_extractor
from dinoscale.models.zoo import build_backbone

SHAPE = BackboneShape(
    "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=2
)
CARD = BackboneCard(
    SHAPE, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), resize=36, crop=32, source="untrained"
)
COLORS = {"blue": (20, 40, 200), "green": (20, 190, 40), "red": (200, 30, 30)}


def _folder(root: Path, classes: dict[str, str], *, images: int, seed: int) -> Path:
    """Folder name -> color of its noisy images."""
    rng = np.random.default_rng(seed)
    for name, color in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(images):
            pixels = np.clip(COLORS[color] + rng.normal(0, 15, (24, 20, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("knn")
    torch.manual_seed(1)
    sizes = {"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 2}
    backbone = build_backbone("vit_tiny_patch16_224", img_size=32, **sizes)
    save_backbone(root / "weights.safetensors", backbone.state_dict(), CARD)
    same = {name: name for name in COLORS}
    _folder(root / "train", same, images=6, seed=0)
    _folder(root / "test", same, images=3, seed=1)
    _folder(root / "other", {"green": "green", "red": "red", "violet": "blue"}, images=1, seed=2)
    _folder(root / "swapped", {"blue": "red", "green": "green", "red": "blue"}, images=3, seed=1)
    return root


_OPTIONS = {field.name for field in fields(ExtractionOptions)}


def _run(place: Path, test: str = "test", **changes: object) -> dict[str, object]:
    options: dict[str, object] = {"num_workers": 0, "progress": False, "device": "cpu"}
    own = {name: changes.pop(name) for name in list(changes) if name not in _OPTIONS}
    specs = (place / "weights.safetensors", str(place / "train"), str(place / test))
    settings = {"ks": (1, 5), **own, "options": ExtractionOptions(**(options | changes))}  # type: ignore[arg-type]  # several types
    return evaluate_knn(*specs, **settings)  # type: ignore[arg-type]  # several types


def test_the_report_is_json_and_says_what_was_measured_and_how(place: Path) -> None:
    report = _run(place, pixels=True)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["knn"]["5"] == {"top1": 100.0, "top5": 100.0, "neighbours": 5}  # type: ignore[index]  # nested report
    assert report["train"] == {
        "spec": str(place / "train"),
        "images": 18,
        "unreadable": 0,
        "left_out": {},
        "classes": 3,
    }
    assert report["test"] == {
        "spec": str(place / "test"),
        "images": 9,
        "unreadable": 0,
        "left_out": {},
        "classes": 3,
    }
    protocol = report["protocol"]
    assert (protocol["resize"], protocol["crop"], protocol["temp"]) == (36, 32, 0.07)  # type: ignore[index]  # nested report
    assert report["pixels"]["knn"]["1"]["top1"] == 100.0  # type: ignore[index]  # nested report
    assert report["pixels"]["knn_equal_votes"]["5"]["top1"] == 100.0  # type: ignore[index]  # nested report


def test_wrong_labels_give_wrong_answers(place: Path) -> None:
    report = _run(place, test="swapped", pixels=True)
    assert report["knn"]["1"]["top1"] == pytest.approx(100 / 3)  # type: ignore[index]  # nested report
    assert report["pixels"]["knn"]["1"]["top1"] == pytest.approx(100 / 3)  # type: ignore[index]  # nested report


def test_unreadable_images_are_counted_and_a_class_without_others_is_logged(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(place / "train", tmp_path / "test")
    for name in ("blue/0.png", "blue/1.png", *(f"red/{i}.png" for i in range(6))):
        (tmp_path / "test" / name).write_bytes(b"damaged")
    (tmp_path / "test" / "blue" / "9.png").symlink_to("gone.png")
    report = _run(place, test=str(tmp_path / "test"))
    assert (report["test"]["images"], report["test"]["unreadable"]) == (10, 8)  # type: ignore[index]  # nested report
    assert report["test"]["left_out"] == {"dead_link": 1}  # type: ignore[index]  # nested report
    assert "left out 1 links that lead nowhere" in caplog.text
    assert "no image can be read" not in caplog.text
    weights, bank = place / "weights.safetensors", str(tmp_path / "test")
    evaluate_knn(
        weights, bank, str(place / "test"), ks=(1,), options=ExtractionOptions(num_workers=0)
    )
    assert "train: no image can be read of 1 classes that test has" in caplog.text


def test_classes_that_differ_are_named(place: Path) -> None:
    with pytest.raises(DataError, match="no images of: 'violet'; train has 'blue', 'green', 'red'"):
        _run(place, test="other")


class _Named:
    def __init__(self, names: list[str] | None, labels: list[int]) -> None:
        self.class_names = names
        self.labels = np.array(labels)

    def path(self, index: int) -> str:
        return str(index)


def test_equal_names_in_another_order_are_matched_by_name() -> None:

    train, test = _Named(["a", "b", "c"], [0, 1, 2]), _Named(["c", "a", "b"], [0, 1, 2])
    assert renumber_classes(train, test).tolist() == [2, 0, 1]  # type: ignore[arg-type]  # a part of a source
    shards = _Named(None, [0, 4])
    assert renumber_classes(shards, shards).tolist() == [0, -1, -1, -1, 4]  # type: ignore[arg-type]  # a part of a source


def test_a_bank_of_one_class_is_refused() -> None:
    one, two = _Named(["a"], [0, 0]), _Named(["a", "b"], [0, 1])
    with pytest.raises(DataError, match="train: all images are of one class"):
        renumber_classes(one, two)  # type: ignore[arg-type]  # a part of a source


def test_numbers_that_the_bank_lacks_are_named() -> None:
    bank, test = _Named(None, [0, 4]), _Named(None, [0, 4, 7, 9])
    with pytest.raises(DataError, match="has no images of: number 7, number 9"):
        renumber_classes(bank, test)  # type: ignore[arg-type]  # a part of a source


def test_baselines_and_score_have_the_same_keys_the_quoted_one_first(place: Path) -> None:
    report = _run(place, ks=(1, 20, 5), pixels=True, untrained=True)
    names = ["top1_k20", "top1_k1", "top1_k5"]
    assert [list(report[part]) for part in ("score", "floors", "untrained")] == 3 * [names]  # type: ignore[call-overload]  # nested report
    assert report["score"]["top1_k5"] == report["knn"]["5"]["top1"]  # type: ignore[index]  # nested report
    assert report["floors"]["top1_k1"] == report["pixels"]["knn"]["1"]["top1"]  # type: ignore[index]  # nested report


def test_untrained_is_the_same_fresh_network_whatever_the_weights_and_the_generator(
    place: Path,
) -> None:
    options = ExtractionOptions(num_workers=0, device="cpu", progress=False)
    extractor = load_extractor(place / "weights.safetensors", options)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = extractor.untrained().backbone.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    second = extractor.untrained().untrained().backbone.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    own = extractor.backbone.state_dict()
    assert any(not torch.equal(first[name], own[name]) for name in first)


def test_a_set_without_classes_is_refused(place: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "flat.png")
    with pytest.raises(DataError, match="test: the images have no labels"):
        evaluate_knn(
            place / "weights.safetensors",
            str(place / "train"),
            str(tmp_path),
            options=ExtractionOptions(num_workers=0),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": ()}, "ks"),
        ({"ks": (0, 5)}, "ks"),
        ({"temp": -1.0}, "temp"),
        ({"batch_size": 0}, "batch_size"),
        ({"crop": 40}, "crop <= resize"),
        ({"crop": 0}, "crop <= resize"),
        ({"device": "warp-drive"}, "device: 'warp-drive'"),
    ],
)
def test_settings_out_of_range_are_refused(
    place: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _run(place, **change)


def test_a_missing_weights_file_is_named(place: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate_knn("nowhere.safetensors", str(place / "train"), str(place / "test"))
