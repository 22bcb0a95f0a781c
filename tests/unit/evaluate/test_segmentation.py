"""The class of every pixel: metrics by hand and by scikit-learn, masks, layouts, commands."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from torch import Tensor
from torch.nn import functional as F

from dinoscale import cli
from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.data.sources.source import Source, open_source
from dinoscale.errors import ConfigError, DataError, DinoscaleError
from dinoscale.evaluate.classification.resumable_training import State, TrainingState
from dinoscale.evaluate.dense.mask_pictures import PANEL
from dinoscale.evaluate.dense.object_masks import find_masks
from dinoscale.evaluate.dense_probes import linear_head, patch_maps
from dinoscale.evaluate.dense_probes.linear_head import LinearHead, Recipe
from dinoscale.evaluate.dense_probes.pair_crops import CropRule, cut_pair
from dinoscale.evaluate.dense_probes.patch_maps import BlockMaps, PixelMaps, choose_blocks
from dinoscale.evaluate.dense_probes.probe import ProbeOptions
from dinoscale.evaluate.dense_probes.sliding import slide, to_pixels, window_starts
from dinoscale.evaluate.dense_probes.target_files import Part, TargetFiles
from dinoscale.evaluate.depth.protocol import DepthProtocol
from dinoscale.evaluate.segmentation.confusion import Confusion, enlarged_argmax
from dinoscale.evaluate.segmentation.index_masks import (
    VOID,
    Classes,
    MaskRule,
    MaskTargets,
    patch_classes,
)
from dinoscale.evaluate.segmentation.layouts import Layout, find_layout
from dinoscale.evaluate.segmentation.patch_bank import Bank, votes
from dinoscale.evaluate.segmentation.patch_logistic import fit_bank
from dinoscale.evaluate.segmentation.protocols import Knn, Linear, Logistic, cross_entropy
from dinoscale.evaluate.segmentation.segmentation import evaluate_segmentation
from dinoscale.models.zoo import build_backbone

SHAPE = BackboneShape(
    "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=1
)
OPTIONS = ProbeOptions(num_workers=0, batch_size=4, progress=False)
COLORS = np.array([[200, 30, 30], [20, 190, 40], [20, 40, 200]])
SMALL = {"size": 24}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    torch.manual_seed(1)
    card = BackboneCard(SHAPE, (0.5,) * 3, (0.25,) * 3, resize=16, crop=16, source="test")
    save_backbone(path, build_backbone(**vars(SHAPE)).state_dict(), card)
    return path


def _pair(
    seed: int, *, width: int = 30, height: int = 26, border: bool = True
) -> list[Image.Image]:
    """Colored halves with noise, and a mask with a palette of their classes, 255 between them."""
    rng = np.random.default_rng(seed)
    first, second = rng.choice(3, 2, replace=False)
    cut = int(rng.integers(8, width - 8))
    classes = np.full((height, width), first, np.uint8)
    classes[:, cut:] = second
    pixels = np.clip(COLORS[classes] + rng.normal(0, 20, (height, width, 3)), 0, 255)
    if border:
        classes[:, cut] = VOID
    mask = Image.fromarray(classes)
    mask.putpalette(list(range(256)) * 3)
    return [Image.fromarray(pixels.astype(np.uint8)), mask]


def _save(images: Path, masks: Path, names: list[str], *, first: int = 0, mask: str = "{}") -> None:
    for seed, name in enumerate(names, start=first):
        image, classes = _pair(seed)
        for file in (images / f"{name}.png", masks / f"{mask.format(name)}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
        image.save(images / f"{name}.png")
        classes.save(masks / f"{mask.format(name)}.png")


@pytest.fixture
def sets(tmp_path: Path) -> Layout:
    """Six train images, one of them in a subfolder, and three test images."""
    names = ["a", "b", "c", "d", "sub/e", "f"]
    _save(tmp_path / "train", tmp_path / "train-masks", names)
    _save(tmp_path / "test", tmp_path / "test-masks", ["x", "y", "z"], first=10)
    parts = [Part(str(tmp_path / n), str(tmp_path / f"{n}-masks")) for n in ("train", "test")]
    return Layout(parts[0], parts[1])


def test_scores_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 4, (2, 5, 40, 30))
    truth[truth == 3] = 1  # class 3 is missing in the masks, but found
    truth[rng.random(truth.shape) < 0.1] = VOID
    confusion = Confusion(5)  # class 4 is in neither
    for one, other in zip(found, truth, strict=True):
        confusion.add(torch.from_numpy(one), torch.from_numpy(other))
    counted = truth != VOID
    pairs = truth[counted], found[counted]
    np.testing.assert_array_equal(confusion.counts[:4, :4], confusion_matrix(*pairs))
    each = jaccard_score(*pairs, average=None, labels=range(4))
    assert confusion.iou()[:4] == pytest.approx(100 * each)
    assert confusion.iou()[4] is None
    score = confusion.score()
    assert score["miou"] == pytest.approx(100 * each.mean())
    assert score["pixel_accuracy"] == pytest.approx(100 * accuracy_score(*pairs))
    assert confusion.missing() == [3, 4]


@pytest.mark.parametrize(("truth", "found"), [(3, 0), (3, 2), (4, 1)])
def test_a_class_that_is_none_is_not_counted_as_void(truth: int, found: int) -> None:
    with pytest.raises(AssertionError):
        Confusion(3).add(torch.tensor([[found]]), torch.tensor([[truth]]))


@pytest.mark.parametrize(("height", "width"), [(13, 40), (3, 2), (5, 7)])
def test_scores_are_enlarged_as_torch_does(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoscale.evaluate.segmentation.confusion._SCORES_AT_ONCE", 100)
    scores = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = F.interpolate(scores[None], size=(height, width), mode="bilinear")[0].argmax(dim=0)
    assert torch.equal(enlarged_argmax(scores, height=height, width=width), expected)


def test_patch_class_is_that_of_most_pixels() -> None:
    mask = np.array(
        [[0, 0, 2, 2], [1, 0, VOID, VOID], [VOID, VOID, 1, 3], [VOID, VOID, 3, 3]], np.uint8
    )
    assert patch_classes(mask, rows=2, columns=2).tolist() == [[0, 2], [-1, 3]]
    assert patch_classes(mask[:1, :1], rows=2, columns=3).tolist() == [[0] * 3] * 2


def test_nearest_patches_vote_by_softmax() -> None:
    features = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]), dim=1)
    bank = Bank(features, torch.tensor([2, 0, 1]), torch.zeros(3))
    found = votes(torch.tensor([[1.0, 0.0]]), bank, num_classes=4, k=2, temp=0.5)
    weights = np.exp(np.array([1.0, 0.5**0.5]) / 0.5)
    expected = [weights[1] / weights.sum(), 0, weights[0] / weights.sum(), 0]
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float32))
    assert (
        votes(features, bank, num_classes=4, k=99, temp=0.5).sum(dim=1).tolist()
        == [pytest.approx(1)] * 3
    )


@pytest.mark.parametrize("present", [(0, 2), (0, 2, 3)], ids=["two", "three"])
def test_logistic_regression_is_scikit_learns(present: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor(present)[torch.arange(60) % len(present)]  # of five
    rows = torch.randn(60, 3, generator=generator) + classes[:, None] * torch.tensor([1.0, 0, -1])
    features, images = F.normalize(rows, dim=1), torch.arange(60) // 6
    bank = Bank(features, classes, images)
    found = fit_bank(bank, num_classes=5, cs=(0.1, 10.0), max_iter=99)
    held = (images == 1).numpy()
    x, y = features.double().numpy(), classes.numpy()
    accuracy = {
        c: LogisticRegression(C=c).fit(x[~held], y[~held]).score(x[held], y[held]) * 100
        for c in (0.1, 10.0)
    }
    assert list(found.held_out.values()) == pytest.approx(list(accuracy.values()))
    assert found.c == max(accuracy, key=accuracy.__getitem__)
    expected = np.zeros((60, 5))
    expected[:, present] = LogisticRegression(C=found.c).fit(x, y).predict_proba(x)
    np.testing.assert_allclose(found.classifier.probabilities(features), expected, atol=1e-3)


def test_of_equal_accuracies_the_strongest_penalty_is_chosen() -> None:
    classes = torch.arange(40) % 2
    features = F.one_hot(classes, 3).float()  # any penalty tells them apart
    found = fit_bank(
        Bank(features, classes, torch.arange(40) // 4), num_classes=2, cs=(10.0, 0.1), max_iter=9
    )
    assert found.held_out == {"10": 100.0, "0.1": 100.0}
    assert found.c == 0.1


def test_windows_cover_an_image() -> None:
    assert window_starts(512, window=512, stride=341) == [0]
    assert window_starts(683, window=512, stride=341) == [0, 171]
    assert window_starts(1024, window=512, stride=341) == [0, 341, 512]


def _means(windows: Tensor) -> Tensor:
    """The mean of each 4 x 4 patch."""
    return F.avg_pool2d(windows, 4)


def test_one_window_is_the_whole_image() -> None:
    images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    slid = slide(images, _means, patch=4, window=12, stride=8, batch_size=3)
    assert torch.equal(slid, to_pixels(_means(images), patch=4, height=8, width=12))


def test_windows_are_averaged_where_they_overlap() -> None:
    image = torch.randn(1, 2, 4, 10, generator=torch.Generator().manual_seed(0))
    slid = slide(image, _means, patch=4, window=4, stride=3, batch_size=2)
    total, covered = torch.zeros(2, 4, 10), torch.zeros(10)
    for start in (0, 3, 6):
        window = _means(image[:, :, :, start : start + 4])
        total[:, :, start : start + 4] += window[0].expand(2, 4, 4)
        covered[start : start + 4] += 1
    torch.testing.assert_close(slid[0], total / covered)


def test_blocks_of_a_deep_network() -> None:
    """Four of twelve: the last, or evenly spread, as DINOv2 counts them 3, 6, 9, 12."""
    vit = SimpleNamespace(last_attention=print, patch_size=8, depth=12)
    assert choose_blocks(vit, 4, "last") == (8, 9, 10, 11)
    assert choose_blocks(vit, 4, "even") == (2, 5, 8, 11)
    assert choose_blocks(vit, 1, "even") == (11,)


def test_feature_maps_lie_where_their_patches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(**vars(SHAPE)).eval().requires_grad_(False)
    assert choose_blocks(backbone, 2, "last") == choose_blocks(backbone, 2, "even") == (0, 1)
    images = torch.randn(2, 3, 20, 30)
    made = BlockMaps(backbone, (0, 1), "fp32")(images)
    assert made.shape == (2, 64, 3, 4)
    padded = F.pad(images, (0, 2, 0, 4))
    tokens = backbone.intermediate(padded, 2)
    torch.testing.assert_close(made[1, 32:, 2, 1], tokens[1][1, 1 + 2 * 4 + 1])
    torch.testing.assert_close(made[0, :32, 0, 3], tokens[0][0, 1 + 3])
    pixels = PixelMaps(patch=8, channels=3)(images)
    torch.testing.assert_close(pixels[1, :, 1, 2], padded[1, :, 8:16, 16:24].flatten())
    monkeypatch.setattr(patch_maps, "MAX_PATCHES", 11)
    with pytest.raises(DataError, match="3 x 4 patches, more than 11"):
        BlockMaps(backbone, (1,), "fp32")(images)
    with pytest.raises(ConfigError, match="need 1 to 2, the blocks of this ViT, got 4"):
        choose_blocks(backbone, 4, "last")


def test_long_images_are_refused_by_name(sets: Layout, weights: Path) -> None:
    """A strip, resized as others, would take gigabytes."""
    for folder in (sets.test.images, str(sets.test.targets)):
        Image.new("L", (4000, 1)).save(Path(folder) / "strip.png")
    for protocol in (Knn(size=48), replace(LINEAR, size=512)):
        with pytest.raises(DataError, match=r"strip.png: 4000 x 1 pixels become "):
            evaluate_segmentation(weights, sets, protocol=protocol, options=OPTIONS)


@pytest.mark.parametrize("shape", [(12, 16), (6, 8)], ids=["equal", "half"])
def test_crops_cut_image_and_mask_alike(shape: tuple[int, int]) -> None:
    columns = np.arange(shape[1], dtype=np.uint8) * (16 // shape[1])
    mask = np.broadcast_to(columns, shape).copy()
    pixels = np.broadcast_to((np.arange(16, dtype=np.uint8) * 10)[:, None], (12, 16, 3)).copy()
    flipped = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image, inside, cut = cut_pair(pixels, mask, CropRule(20, 8, None), rng, fill=VOID)
        assert image.shape == (20, 8, 3)
        assert inside[:12].all()
        assert not inside[12:].any()
        assert (cut[12:] == VOID).all()
        assert (abs(image[:12, :, 0] / 10 - cut[:12]) <= 16 // shape[1] - 1).all()
        flipped.add(bool(image[0, 0, 0] > image[0, 1, 0]))
    assert flipped == {True, False}


def test_loss_is_the_mean_over_pixels_that_are_not_void() -> None:
    logits = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(0, 3, (2, 7, 8), generator=torch.Generator().manual_seed(1))
    masks[0, :3] = VOID
    enlarged = F.interpolate(logits, size=(8, 8), mode="bilinear")[:, :, :7]
    expected = F.cross_entropy(enlarged, masks, ignore_index=VOID)
    torch.testing.assert_close(cross_entropy(4)(logits, masks.byte()), expected)
    assert float(cross_entropy(4)(logits, torch.full_like(masks, VOID))) == 0


LINEAR = Linear(
    size=24, crop=24, stride=16, recipe=Recipe(30, 4, lr=0.05, weight_decay=0.0, warmup=0.1)
)


def test_dropout_is_of_channels_and_a_function_of_seed_and_step() -> None:
    published = Linear().protocol()
    assert (published["dropout"], published["clip"]) == (0.1, 35.0)
    recipe = replace(LINEAR.recipe, dropout=0.25)
    assert LINEAR.recipe.kept(2, 3, seed=0, step=0) is None
    kept = recipe.kept(50, 40, seed=1, step=7)
    assert kept is not None
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=5 * (3 / 16 / 2000) ** 0.5)
    same, *others = (
        recipe.kept(50, 40, seed=seed, step=step) for seed, step in ((1, 7), (1, 8), (2, 7))
    )
    assert same is not None
    assert torch.equal(same, kept)
    assert not any(other is None or torch.equal(other, kept) for other in others)
    head, features = LinearHead(40, 2, seed=0).eval(), torch.randn(50, 40, 3, 2)
    assert torch.equal(head(features, kept), head.linear(head.norm(features) * kept))
    with pytest.raises(ConfigError, match="need 0 <= dropout < 1, got 1"):
        replace(LINEAR.recipe, dropout=1.0)


def test_a_head_is_trained_with_dropout(sets: Layout, weights: Path) -> None:
    def score(dropout: float) -> object:
        recipe = replace(LINEAR.recipe, iterations=2, dropout=dropout)
        protocol = replace(LINEAR, recipe=recipe)
        return evaluate_segmentation(weights, sets, protocol=protocol, options=OPTIONS)["score"]

    assert score(0.5) == score(0.5) != score(0.0)


@pytest.mark.parametrize(
    "protocol",
    [Knn(**SMALL, k=3), Logistic(**SMALL, cs=(1.0, 100.0), max_iter=50), LINEAR],
    ids=["knn", "logistic", "linear"],
)
def test_halves_are_told_apart(
    protocol: Knn | Logistic | Linear, sets: Layout, weights: Path
) -> None:
    report = evaluate_segmentation(
        weights, sets, protocol=protocol, options=replace(OPTIONS, layers=2, pixels=True)
    )
    floor = report["baselines"]["most_frequent_class"]
    assert report["score"]["miou"] > 1.5 * floor["miou"]
    assert report["baselines"]["colors"]["pixel_accuracy"] > floor["pixel_accuracy"]
    assert report["classes"] == len(report["iou"]) == 3
    assert report["blocks"] == [0, 1]
    assert report["train"]["images"] == 6


def test_bank_takes_equally_many_patches_of_each_image(sets: Layout, weights: Path) -> None:
    report = evaluate_segmentation(weights, sets, protocol=Knn(**SMALL, bank=13), options=OPTIONS)
    assert report["bank"] == 12


def test_masks_of_another_size_score_alike(sets: Layout, weights: Path) -> None:
    """Halves of the double size are the same halves; a rotated mask is refused."""

    def score() -> object:
        protocol = Knn(**SMALL, k=3)
        return evaluate_segmentation(weights, sets, protocol=protocol, options=OPTIONS)["score"]

    before = score()
    masks = [*Path(str(sets.test.targets)).rglob("*.png")]
    for path in masks:
        mask = Image.open(path)
        mask.resize((2 * mask.width, 2 * mask.height), Image.Resampling.NEAREST).save(path)
    assert score() == pytest.approx(before, abs=3)
    Image.open(masks[0]).transpose(Image.Transpose.ROTATE_90).save(masks[0])
    with pytest.raises(DataError, match=r"30 x 26 pixels, its target 52 x 60.*upright"):
        score()


def _mask(numbers: list[list[int]], kind: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.array(numbers, kind))


def test_numbers_of_masks() -> None:
    rule = MaskRule()
    assert rule.classes(_mask([[0, 300 - 46], [2, 255]], np.uint16), "a").tolist() == [
        [0, 254],
        [2, 255],
    ]
    assert rule.classes(_mask([[0, 7]]).convert("RGB"), "a").tolist() == [[0, 7]]
    assert MaskRule(ignore_zero=True).classes(_mask([[0, 1, 255]]), "a").tolist() == [[255, 0, 255]]
    binary = MaskRule(binary=True)
    assert binary.classes(_mask([[0, 127, 128, 255]]), "a").tolist() == [[0, 0, 1, 1]]
    gray = _mask([[0, 3, 2**15 - 1, 2**15, 2**16 - 1]], np.uint16)
    assert binary.classes(gray, "a").tolist() == [[0, 0, 0, 1, 1]]
    numbered = _mask([[0, 3, 254, 255]])
    numbered.putpalette(list(range(256)) * 3)
    assert binary.classes(numbered, "a").tolist() == [[0, 1, 1, VOID]]
    assert binary.classes(Image.new("1", (2, 1), 1), "a").tolist() == [[1, 1]]
    for dtype in (np.uint8, np.uint16):
        with pytest.raises(DataError, match=r"a: its mask holds numbers up to 1, .*leave --binary"):
            binary.classes(_mask([[0, 1]], dtype), "a")
    with pytest.raises(DataError, match=r"a: its mask holds the number 300"):
        rule.classes(_mask([[300]], np.uint16), "a")
    with pytest.raises(DataError, match=r"class 3, but there are 3 classes.*--classes"):
        MaskRule(num_classes=3).classes(_mask([[3]]), "a")
    with pytest.raises(DataError, match="mode RGB, and no class numbers"):
        rule.classes(Image.new("RGB", (1, 1), (1, 2, 3)), "a")


def test_images_without_mask_or_damaged_are_left_out(sets: Layout, weights: Path) -> None:
    masks = Path(str(sets.train.targets))
    (masks / "b.png").unlink()
    damaged = Path(sets.test.images) / "y.png"
    data = io.BytesIO()
    Image.open(damaged).save(data, "JPEG")
    damaged.with_suffix(".jpg").write_bytes(data.getvalue()[:-200])
    damaged.unlink()
    report = evaluate_segmentation(weights, sets, protocol=Knn(**SMALL), options=OPTIONS)
    assert report["train"]["images"] == 5
    assert report["train"]["without_target"] == 1
    assert report["scored"] == 2
    for path in masks.rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="none of 6 images can be read and has a mask"):
        evaluate_segmentation(weights, sets, protocol=Knn(**SMALL), options=OPTIONS)


@pytest.mark.parametrize("protocol", [Knn(**SMALL), LINEAR], ids=["whole", "crops"])
def test_a_mask_that_vanished_is_named(
    protocol: Knn | Linear, sets: Layout, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = MaskTargets.read, set[str]()

    def read_once(targets: MaskTargets, source: Source, index: int) -> Classes | None:
        path = source.path(index)
        found = None if path in seen else read(targets, source, index)
        seen.add(path)
        return found

    monkeypatch.setattr(MaskTargets, "read", read_once)
    with pytest.raises(DataError, match=r"train/.*: its mask has vanished since the start"):
        evaluate_segmentation(weights, sets, protocol=protocol, options=OPTIONS)


def test_a_file_system_that_fails_once_does_not_hide_a_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path / "images", tmp_path / "masks", ["a"])
    source = open_source(str(tmp_path / "images"))
    files = TargetFiles("mask.png", str(tmp_path / "masks"), str(tmp_path / "images"))
    stat, failed = os.stat, set[str]()

    def fails_once(path: Any, **options: Any) -> os.stat_result:
        if "masks" in str(path) and "a." in str(path) and str(path) not in failed:
            failed.add(str(path))
            raise OSError(errno.EIO, "no answer")
        return stat(path, **options)

    mask_of = find_masks(source, str(tmp_path / "images"), str(tmp_path / "masks"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(os, "stat", fails_once)
    assert files.path(source, 0) == str(tmp_path / "masks" / "a.png")
    failed.clear()
    assert mask_of(0) is not None
    assert failed


def _train_masks(sets: Layout, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in Path(str(sets.train.targets)).rglob("*.png"):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


def test_masks_that_are_no_classes(sets: Layout, weights: Path) -> None:
    def fails(match: str, num_classes: int | None = None) -> None:
        layout = Layout(sets.train, sets.test, MaskRule(num_classes=num_classes))
        with pytest.raises(DinoscaleError, match=match):
            evaluate_segmentation(weights, layout, protocol=Knn(**SMALL), options=OPTIONS)

    fails("holds class 2, but there are 2 classes", num_classes=2)
    _train_masks(sets, lambda mask: mask.clip(max=1))
    fails("test/.*holds class 2, but there are 2 classes")
    _train_masks(sets, lambda mask: 255 * mask)
    fails("hold 1 class, need at least two. If 255 is an object, not void, add --binary")


def test_one_image(weights: Path, tmp_path: Path) -> None:
    """One image is enough for k-NN, and too few to choose a penalty on."""
    _save(tmp_path / "one", tmp_path / "one-masks", ["a"])
    one = Part(str(tmp_path / "one"), str(tmp_path / "one-masks"))
    report = evaluate_segmentation(
        weights, Layout(one, one), protocol=Knn(**SMALL), options=OPTIONS
    )
    assert report["score"]["pixel_accuracy"] > 80
    with pytest.raises(DataError, match="patches of a single image"):
        evaluate_segmentation(
            weights, Layout(one, one), protocol=Logistic(**SMALL), options=OPTIONS
        )


def test_class_missing_in_test(sets: Layout, weights: Path) -> None:
    for path in Path(str(sets.test.targets)).rglob("*.png"):
        mask = np.array(Image.open(path))
        mask[mask == 2] = VOID
        Image.fromarray(mask).save(path)
    report = evaluate_segmentation(weights, sets, protocol=Knn(**SMALL, k=1), options=OPTIONS)
    assert report["missing_in_test"] == ["2"]
    assert report["iou"]["2"] in (None, 0)


def test_voc(tmp_path: Path, weights: Path) -> None:
    root = tmp_path / "VOC2012"
    _save(root / "JPEGImages", root / "SegmentationClass", ["a", "b", "c"])
    for path in (root / "JPEGImages").iterdir():
        path.rename(path.with_suffix(".jpg"))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "val.txt").write_text("b\n")
    report = evaluate_segmentation(
        weights, find_layout(str(root)), protocol=Knn(**SMALL), options=OPTIONS
    )
    assert (report["train"]["images"], report["test"]["images"]) == (2, 1)
    assert report["classes"] == 21
    assert list(report["iou"])[:2] == ["background", "aeroplane"]


def test_ade(tmp_path: Path, weights: Path) -> None:
    root = tmp_path / "ADEChallengeData2016"
    for part in ("training", "validation"):
        _save(root / "images" / part, root / "annotations" / part, ["a", "b", "c"])
    report = evaluate_segmentation(
        weights, find_layout(str(root)), protocol=Knn(**SMALL), options=OPTIONS
    )
    assert report["classes"] == 150
    assert report["iou"]["2"] is None  # of the numbers 0, 1, 2 the first is void


def test_cityscapes(tmp_path: Path, weights: Path) -> None:
    root = tmp_path / "cityscapes"
    for part in ("train", "val"):
        _save(root / "images", root / "masks", ["a", "b"])
        for kind, name in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            (root / kind / part / "bonn").mkdir(parents=True)
            for stem in ("a", "b"):
                file = root / ("images" if kind == "leftImg8bit" else "masks") / f"{stem}.png"
                picture = Image.open(file)
                if kind == "gtFine":
                    picture = Image.fromarray(
                        np.array([7, 8, 3], np.uint8)[np.asarray(picture) % 3]
                    )
                picture.save(root / kind / part / "bonn" / f"{stem}_{name}.png")
    report = evaluate_segmentation(
        weights, find_layout(str(root)), protocol=Knn(**SMALL), options=OPTIONS
    )
    assert report["classes"] == 19
    numbers = _mask([[7, 3, 33, 29, 255]])  # of 3 and 29 nothing is scored
    assert find_layout(str(root)).rule.classes(numbers, "a").tolist() == [[0, 255, 18, 255, 255]]
    assert {name for name, value in report["iou"].items() if value is not None} == {
        "road",
        "sidewalk",
    }
    (root / "gtFine" / "val").rename(root / "gtFine" / "validation")
    with pytest.raises(DataError, match=r"gtFine/val is missing"):
        find_layout(str(root))
    with pytest.raises(DataError, match="none of the folders JPEGImages"):
        find_layout(str(tmp_path))


def test_interrupted_training_resumes_to_the_same_numbers(
    sets: Layout, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_head, "SAVE_EVERY", 10)

    def trained(name: str) -> dict[str, object]:
        return evaluate_segmentation(
            weights, sets, protocol=LINEAR, options=replace(OPTIONS, out=tmp_path / name)
        )

    expected = trained("whole.safetensors")
    assert not [*tmp_path.glob("whole.safetensors.*")]
    save = TrainingState.save

    def save_and_end(saved: TrainingState, state: State) -> None:
        save(saved, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(TrainingState, "save", save_and_end)
        with pytest.raises(KeyboardInterrupt):
            trained("cut.safetensors")
    drawn = []
    batches = linear_head.pair_crops
    monkeypatch.setattr(
        linear_head, "pair_crops", lambda *a, **k: drawn.append(k["first_step"]) or batches(*a, **k)
    )
    assert trained("cut.safetensors")["score"] == expected["score"]
    assert drawn == [10]
    whole, cut = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("whole", "cut"))
    assert whole == cut


def test_command_on_shards(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gray masks of objects in shards, as those of saliency sets."""
    for name in ("train", "test"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for seed in range(3):
                image, mask = _pair(seed + 5 * (name == "test"), border=False)
                gray = Image.fromarray(np.where(np.asarray(mask) > 0, 255, 0).astype(np.uint8))
                for part, end in ((image, "jpg"), (gray, "mask.png")):
                    data = io.BytesIO()
                    part.save(data, "PNG")
                    member = tarfile.TarInfo(f"{seed}.{end}")
                    member.size = data.tell()
                    data.seek(0)
                    tar.addfile(member, data)
    words = ["evaluate", "segmentation", str(weights), "--train", str(tmp_path / "train.tar")]
    words += ["--val", str(tmp_path / "test.tar"), "--binary", "--size", "24", "--num-workers", "0"]
    sheet = tmp_path / "pictures" / "segmentation-sheet.png"
    cli.run([*words, "--untrained", "--pixels", "--k", "3", "--pictures", str(sheet.parent)])
    report = json.loads(capsys.readouterr().out)
    assert list(report["score"]) == ["miou", "pixel_accuracy"]
    assert report["untrained"].keys() == report["floors"].keys() == report["score"].keys()
    assert report["made_from"]["input"]["test"]["number"] == 1
    assert report["scored"] == 3
    assert Image.open(sheet).width > 2 * PANEL
    for more, match in (
        (["--iterations", "3"], "--iterations: --protocol knn has no such option"),
        (["--out", "head.safetensors"], "out: only --protocol linear"),
        (["--data", "VOC2012"], "--data: the set says what --train, --test, --binary would"),
    ):
        with pytest.raises(ConfigError, match=match):
            cli.run([*words, *more])


def test_head_starts_at_chance() -> None:
    head = LinearHead(4, 3, seed=0)
    assert float(head.linear.weight.detach().std()) == pytest.approx(0.01, rel=0.5)
    assert not head.linear.bias.any()


def test_rates_of_the_published_schedules() -> None:
    """1,500 of 40,000 steps of warm-up for classes, a third of 38,400 for depth."""
    for recipe, warmup, lr in (
        (Linear().recipe, 1500, 1e-3),
        (DepthProtocol().recipe, 12_800, 3e-4),
    ):
        assert recipe.rate(0) == 0
        assert recipe.rate(warmup - 1) == pytest.approx(lr)
        assert recipe.rate(warmup) == pytest.approx(lr)
        assert recipe.rate(warmup - 2) < lr * (1 - 0.5 / warmup)
        assert 0 < recipe.rate(recipe.iterations - 1) < 1e-8
