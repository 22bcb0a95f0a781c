"""Jaccard of attention: objects from masks, the index by hand, known baselines."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from dinoscale import cli
from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.data.decoding.decode import read_as_stored
from dinoscale.data.sources.source import open_source
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.dense.attention_maps import center_box, enlarge
from dinoscale.evaluate.dense.object_masks import Objects, find_masks, split_objects
from dinoscale.evaluate.dense.segment import (
    SHEET,
    evaluate_segment,
    jaccard_of_objects,
    mean_over_images,
)
from dinoscale.models.zoo import build_backbone

SIZES = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    shape = BackboneShape("vit_tiny_patch16_224", img_size=32, **SIZES)
    torch.manual_seed(1)
    state = build_backbone("vit_tiny_patch16_224", img_size=32, **SIZES).state_dict()
    card = BackboneCard(shape, (0.5,) * 3, (0.25,) * 3, resize=32, crop=32, source="test")
    save_backbone(path, state, card)
    return path


def _image(*, width: int, height: int, seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _numbered(numbers: list[list[int]] | np.ndarray) -> Image.Image:
    """A mask with a palette."""
    mask = Image.fromarray(np.array(numbers, np.uint8))
    mask.putpalette(list(range(256)) * 3)
    return mask


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three images with masks: 1 object of 1/4, 2 objects of 1/4 and 1/8 with void, a gray one."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    (images / "sub").mkdir(parents=True)
    (masks / "sub").mkdir(parents=True)
    for seed, (name, width, height) in enumerate((("a", 40, 24), ("sub/b", 16, 32), ("c", 19, 8))):
        _image(width=width, height=height, seed=seed).save(images / f"{name}.jpg")
    quarter = np.zeros((24, 40), np.uint8)
    quarter[:12, 20:] = 7
    _numbered(quarter).save(masks / "a.png")
    two = np.zeros((32, 16), np.uint8)
    two[:8], two[8:12], two[12:16] = 1, 2, 255
    _numbered(two).save(masks / "sub" / "b.png")
    gray = np.zeros((8, 19), np.uint8)
    gray[2:6], gray[6:] = 128, 127
    Image.fromarray(gray).save(masks / "c.bmp")
    return images, masks


def test_jaccard_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(4, 3, 5, generator=generator) < 0.4
    masks = torch.rand(2, 13, 11, generator=generator) < 0.5
    counted = torch.rand(13, 11, generator=generator) < 0.8
    found = jaccard_of_objects(kept, Objects(masks, counted))
    pixels = enlarge(kept, height=13, width=11)
    for m in range(2):
        for h in range(4):
            expected = jaccard_score(masks[m][counted].numpy(), pixels[h][counted].numpy())
            assert float(found[m, h]) == pytest.approx(expected, abs=1e-6)


def test_best_head_of_each_object_then_objects_then_images() -> None:
    two_objects = torch.tensor([[0.2, 0.6], [0.5, 0.1]])  # 0.6 and 0.5: 0.55
    one_object = torch.tensor([[1.0, 0.0]])
    assert mean_over_images([two_objects, one_object]) == pytest.approx(77.5)


def test_palette_masks_hold_object_numbers_and_gray_ones_are_one_object() -> None:
    numbers = [[0, 3, 3], [255, 9, 0]]
    objects = split_objects(_numbered(numbers), indexed=False)
    assert objects.masks.int().tolist() == [[[0, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 1, 0]]]
    assert objects.counted.int().tolist() == [[1, 1, 1], [0, 1, 1]]
    gray = Image.fromarray(np.array(numbers, np.uint8))
    (bright,) = split_objects(gray, indexed=False).masks
    assert bright.int().tolist() == [[0, 0, 0], [1, 0, 0]]
    assert split_objects(gray, indexed=False).counted.all()
    assert torch.equal(split_objects(gray, indexed=True).masks, objects.masks)
    sharp = gray.point([255 * (value > 127) for value in range(256)])
    for mode in ("1", "RGB"):
        assert torch.equal(split_objects(sharp.convert(mode), indexed=True).masks[0], bright)
    for empty in (_numbered([[0, 255]]), Image.new("L", (4, 2), 127)):
        assert len(split_objects(empty, indexed=False).masks) == 0


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_masks_of_16_bits_hold_object_numbers(kind: type, tmp_path: Path) -> None:
    numbers = np.array([[0, 3, 3], [255, 900, 0]], kind)
    Image.fromarray(numbers).save(tmp_path / "m.tif")
    mask = read_as_stored((tmp_path / "m.tif").read_bytes(), "m.tif")
    few = split_objects(_numbered(np.where(numbers == 900, 9, numbers)), indexed=False)
    found = split_objects(mask, indexed=False)
    assert torch.equal(found.masks, few.masks)
    assert torch.equal(found.counted, few.counted)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_masks_without_recognisable_objects_are_refused(
    folders: tuple[Path, Path], weights: Path, mode: str
) -> None:
    images, masks = folders
    mask = Image.open(masks / "a.png").convert("RGB")
    mask.paste((0, 0, 120), (0, 20, 40, 24))  # an object as dark as the background
    mask.convert(mode).save(masks / "a.tif")
    (masks / "a.png").unlink()
    with pytest.raises(DataError, match=rf"a.jpg: a mask of mode {mode} "):
        evaluate_segment(weights, str(images), masks=str(masks), size=16)


def test_a_mask_that_keeps_everything_scores_the_area_of_the_objects(
    folders: tuple[Path, Path], weights: Path
) -> None:
    images, masks = folders
    report = evaluate_segment(weights, str(images), masks=str(masks), size=16, mass=1.0)
    of_b = (8 / 28 + 4 / 28) / 2  # 4 of the 32 rows are void
    expected = 100 * (1 / 4 + of_b + 4 / 8) / 3
    for name in ("score", "untrained", "whole_image"):
        assert report[name]["jaccard"] == pytest.approx(expected, abs=1e-4)  # type: ignore[index]
    assert report["heads"]["score"] == pytest.approx([expected] * 3, abs=1e-4)  # type: ignore[index]
    assert (report["images"], report["objects"]) == (3, 4)
    a = (6 * 10) / (12 * 20 + 12 * 20 - 6 * 10)  # the box overlaps the corner with a quarter
    b = [0.0, (4 * 8) / (16 * 4 + (16 - 4) * 8 - 4 * 8)]  # 4 of the box's 16 rows are void
    c = (4 * 9) / (4 * 19)
    expected = 100 * (a + sum(b) / 2 + c) / 3
    assert report["floors"]["jaccard"] == pytest.approx(expected, abs=1e-4)  # type: ignore[index]


def test_shards_and_folders_give_the_same_report(
    tmp_path: Path, folders: tuple[Path, Path], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = folders
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as tar:
        for name, mask in (("a", "a.png"), ("c", "c.bmp"), ("sub/b", "sub/b.png")):
            png = io.BytesIO()
            Image.open(masks / mask).save(png, "PNG")
            for end, data in (
                ("jpg", (images / f"{name}.jpg").read_bytes()),
                ("mask.png", png.getvalue()),
            ):
                member = tarfile.TarInfo(f"{name}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    out = tmp_path / "out"
    cli.run(["evaluate", "segment", str(weights), str(images), "--masks", str(masks),
             "--size", "16", "--out", str(out)])  # fmt: skip
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    same = evaluate_segment(weights, str(shard), size=16)
    keys = ("score", "untrained", "floors", "whole_image", "heads", "objects", "protocol")
    assert {key: report[key] for key in keys} == {key: same[key] for key in keys}
    assert 0 < report["score"]["jaccard"] != report["untrained"]["jaccard"]
    assert report["score"]["jaccard"] >= max(report["heads"]["score"])
    assert f"these weights {report['score']['jaccard']:10.1f}" in captured.err
    assert (out / SHEET).stat().st_size > 2000


def test_masks_of_another_size_or_without_any_are_refused(
    folders: tuple[Path, Path], weights: Path
) -> None:
    images, masks = folders
    (masks / "a.png").rename(masks / "a.mask")
    report = evaluate_segment(weights, str(images), masks=str(masks), size=16)
    assert report["left_out"]["without_mask"] == [f"{images}/a.jpg"]  # type: ignore[index]  # nested
    _numbered(np.ones((24, 39))).save(masks / "a.png")
    with pytest.raises(DataError, match=r"a\.jpg.* 40 x 24 pixels, its mask 39 x 24"):
        evaluate_segment(weights, str(images), masks=str(masks), size=16)
    for mask in masks.rglob("*.*"):
        mask.unlink()
    with pytest.raises(DataError, match=r"none of 3 .* 3 have no mask"):
        evaluate_segment(weights, str(images), masks=str(masks), size=16)


def test_images_that_are_not_scored_are_counted(
    folders: tuple[Path, Path], weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, masks = folders
    whole = evaluate_segment(weights, str(images), masks=str(masks), size=16)
    _image(width=9, height=9, seed=7).save(images / "empty.png")
    Image.new("L", (9, 9)).save(masks / "empty.png")
    (images / "broken.jpg").write_bytes(b"no image")
    _image(width=9, height=9, seed=8).save(images / "half.png")
    (masks / "half.png").write_bytes((masks / "a.png").read_bytes()[:60])
    report = evaluate_segment(weights, str(images), masks=str(masks), size=16)
    left_out = {kind: len(paths) for kind, paths in report["left_out"].items()}  # type: ignore[attr-defined]
    assert left_out == {"unreadable": 2, "without_mask": 0, "empty_mask": 1}
    assert report["score"] == whole["score"]
    assert "3 of 6 images are scored" in caplog.text
    assert "1 have a mask without an object" in caplog.text


def test_sets_without_masks_and_bad_settings_are_refused(
    folders: tuple[Path, Path], weights: Path
) -> None:
    images, masks = map(str, folders)
    with pytest.raises(DataError, match=r"holds no masks. Name their folder with --masks"):
        evaluate_segment(weights, images)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        evaluate_segment(weights, images, masks=masks + "/nowhere")
    with pytest.raises(ConfigError, match="mass"):
        evaluate_segment(weights, images, masks=masks, mass=1.5)
    with pytest.raises(ConfigError, match="one patch"):
        evaluate_segment(weights, images, masks=masks, size=7)


def test_synthetic_sets_have_masks(weights: Path) -> None:
    report = evaluate_segment(weights, "synthetic:shapes?images=4&size=32", size=32)
    assert (report["images"], report["objects"]) == (4, 4)


@pytest.mark.skipif("DINOSCALE_TEST_DATA" not in os.environ, reason="needs the real images")
def test_baselines_on_ecssd_are_those_of_its_readme() -> None:
    source = open_source(str(Path(os.environ["DINOSCALE_TEST_DATA"]) / "ecssd-masks"))
    mask_of = find_masks(source, "", None)
    boxes, whole = [], []
    for index in range(len(source)):
        mask = mask_of(index)
        assert mask is not None
        objects = split_objects(mask, indexed=False)
        boxes.append(jaccard_of_objects(center_box(*objects.counted.shape), objects))
        whole.append(jaccard_of_objects(torch.ones(1, 1, 1, dtype=torch.bool), objects))
    assert len(boxes) == 120
    assert mean_over_images(boxes) == pytest.approx(38.7, abs=0.05)
    assert mean_over_images(whole) == pytest.approx(21.7, abs=0.05)
