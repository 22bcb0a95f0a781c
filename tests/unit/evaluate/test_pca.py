"""Patch features as colors: scikit-learn's components, one basis for all images, fixed signs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale import cli
from dinoscale.convert.weights_file import (
    BackboneCard,
    BackboneShape,
    load_backbone,
    save_backbone,
)
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.dense.components import find_foreground, fit_basis
from dinoscale.evaluate.dense.pca import BASIS, SHEET, draw_pairs, evaluate_pca
from dinoscale.models.zoo import build_backbone

REGISTERS = 4
# The patch features here are bit for bit those of the command, which takes one image after the
# other, too; what follows is in float64, where a close pair of components costs some digits.
assert_close = partial(np.testing.assert_allclose, atol=1e-9)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT with registers and patches of 8 pixels."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    shape = BackboneShape("vit_small_patch14_reg4_dinov2", img_size=32, **sizes)
    torch.manual_seed(1)
    state = build_backbone(shape.name, img_size=32, **sizes).state_dict()
    card = BackboneCard(shape, (0.5,) * 3, (0.25,) * 3, resize=32, crop=32, source="test")
    save_backbone(path, state, card)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two pictures, wide and high, that need no resize at 32 pixels."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, (name, size) in enumerate((("a", (48, 32)), ("b", (32, 64)))):
        coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{name}.png")
    return folder


def _features(weights: Path, image: Path) -> np.ndarray:
    """Patch tokens (P, D), without our preprocessing."""
    backbone, _ = load_backbone(weights)
    pixels = torch.from_numpy(np.asarray(Image.open(image)) / 255).float()
    tokens = backbone.features((pixels.permute(2, 0, 1)[None] - 0.5) / 0.25)[0]  # type: ignore[operator]  # a ViT
    return tokens[1 + REGISTERS :].numpy()


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    features = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    features *= np.arange(1, 8, dtype=np.float32)
    basis = fit_basis([features[:20], features[20:]])
    exact = features.astype(np.float64)
    centered = exact - exact.mean(axis=0)
    _, values, rows = np.linalg.svd(centered, full_matrices=False)
    for component, row in zip(basis.components, rows, strict=False):
        strongest = np.abs(component).argmax()
        assert component[strongest] > 0
        assert_close(component, row * np.sign(row[strongest]))
    assert_close(basis.explained, (values**2 / (values**2).sum())[:3])
    projected = basis.project(features)
    rounding = np.finfo(np.float32).eps * abs(projected).max()
    np.testing.assert_allclose(projected.mean(axis=0, dtype=np.float64), 0, atol=rounding)
    with pytest.raises(DataError, match=r"3 components .* got \[2, 7\]"):
        fit_basis([features[:2]])


def test_one_basis_for_all_images_and_no_registers(
    tmp_path: Path, weights: Path, images: Path
) -> None:
    out = tmp_path / "out"
    report = evaluate_pca(weights, str(images), out, size=32)
    assert json.loads(json.dumps(report)) == report
    features = [_features(weights, images / f"{name}.png") for name in "ab"]
    basis = fit_basis(features)
    stored = np.load(out / BASIS)
    assert_close(stored["components"], basis.components)
    for name, grid, x in zip("ab", ((4, 6), (8, 4)), features, strict=True):
        raw = np.load(out / name / "pca.npz")
        assert raw["components"].shape == (*grid, 3)
        assert raw["foreground"].all()
        assert raw["seen"].tolist() == [8 * grid[0], 8 * grid[1]]
        expected = (x - stored["mean"]) @ stored["components"].T
        assert_close(raw["components"].reshape(-1, 3), expected.astype(np.float32), rtol=2e-7)
    assert report["score"]["explained_variance"] == pytest.approx(100 * basis.explained.sum())  # type: ignore[index]  # nested
    assert (out / SHEET).stat().st_size > 1000
    first = (out / "b" / "pca.png").read_bytes()
    evaluate_pca(weights, str(images), out, size=32)
    assert (out / "b" / "pca.png").read_bytes() == first


def test_colors_rise_with_the_components_and_fill_patches(
    tmp_path: Path, weights: Path, images: Path
) -> None:
    evaluate_pca(weights, str(images), tmp_path / "out", size=32)
    colors = np.asarray(Image.open(tmp_path / "out" / "a" / "pca.png")).reshape(4, 8, 6, 8, 3)
    assert (colors == colors[:, :1, :, :1]).all()  # nearest: a patch has one color
    patches = colors[:, 0, :, 0].reshape(-1, 3).astype(int)
    components = np.load(tmp_path / "out" / "a" / "pca.npz")["components"].reshape(-1, 3)
    for channel in range(3):
        assert (np.diff(patches[components[:, channel].argsort(), channel]) >= 0).all()
        assert np.ptp(patches[:, channel]) > 100
    evaluate_pca(weights, str(images), tmp_path / "out", size=32, smooth=True)
    assert (np.asarray(Image.open(tmp_path / "out" / "a" / "pca.png")).reshape(colors.shape)
            != colors).any()  # fmt: skip


def test_the_side_rarer_at_the_border_is_foreground() -> None:
    component = np.full((5, 6), -1.0, np.float32)
    component[1:4, 2:4] = 3.0
    front = component > 0
    for sign in (1, -1):
        (found,) = find_foreground([sign * component])
        assert np.array_equal(found, front)


def test_background_patches_are_black_and_do_not_change_the_basis(
    tmp_path: Path, weights: Path, images: Path
) -> None:
    out = tmp_path / "out"
    report = evaluate_pca(weights, str(images), out, size=32, foreground=True)
    assert report["protocol"]["foreground"] is True  # type: ignore[index]  # nested
    features = np.concatenate([_features(weights, images / f"{name}.png") for name in "ab"])
    raws = [np.load(out / name / "pca.npz") for name in "ab"]
    fronts = np.concatenate([raw["foreground"].ravel() for raw in raws])
    above = fit_basis([features]).project(features)[:, 0] > 0
    assert np.array_equal(fronts, above) or np.array_equal(fronts, ~above)
    assert_close(np.load(out / BASIS)["components"], fit_basis([features[fronts]]).components)
    colors = np.asarray(Image.open(out / "a" / "pca.png"))[::8, ::8]
    assert (colors[~raws[0]["foreground"]] == 0).all()


def test_bad_input_is_named(
    tmp_path: Path, weights: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.jpg").write_bytes(b"")
    cli.run(["evaluate", "pca", str(weights), str(images), "--out", str(tmp_path / "out"),
             "--size", "32", "--square"])  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 2
    assert report["protocol"]["square"] is True
    (broken,) = report["left_out"]
    assert "broken.jpg" in broken
    with pytest.raises(ConfigError, match="one patch"):
        evaluate_pca(weights, str(images), tmp_path / "out", size=4)
    with pytest.raises(DataError, match="Use more or larger images"):
        evaluate_pca(weights, str(images), tmp_path / "out", size=8, square=True)
    with pytest.raises(DataError, match="cannot write to"):
        evaluate_pca(weights, str(images), images / "a.png", size=32)


def test_pairs_of_any_shape_fit_the_sheet() -> None:
    pairs = [
        (Image.new("RGB", size, "red"), Image.new("RGB", size, "blue"))
        for size in ((640, 480), (480, 640), (9000, 10), (10, 9000), (480, 480))
    ]
    sheet = np.asarray(draw_pairs(pairs)).astype(int)
    assert sheet.shape[1] <= 1440
    red, blue = (sheet[..., 0] > 200) & (sheet[..., 2] < 50), sheet[..., 2] - sheet[..., 0] > 200
    assert red.sum() == blue.sum() > 0
