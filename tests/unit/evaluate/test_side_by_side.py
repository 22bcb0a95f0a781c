"""Several weights in colors that mean the same, and videos as animations."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale import cli
from dinoscale.convert.weights_file import save_backbone
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.dense.animate import animate_attention, animate_pca
from dinoscale.evaluate.dense.attention_files import (
    heat_overlay,
    on_scale,
    scale_of,
    write_attention,
)
from dinoscale.evaluate.dense.components import fit_basis, resample, turn_to
from dinoscale.evaluate.dense.pca import BASIS, evaluate_pca
from dinoscale.evaluate.dense.side_by_side import draw_table, save_animation
from dinoscale.evaluate.frozen_backbone import LoadOptions
from dinoscale.evaluate.provenance import input_specs
from dinoscale.models.zoo import build_backbone
from tests.unit.evaluate.tiny_files import CARD, SHAPE, as_json, save_picture

OPTIONS = LoadOptions(device="cpu", progress=False)
SIDE = 32


def save_weights(
    path: Path, *, seed: int, patch: int = 8, embed_dim: int = 64, channels: int = 3
) -> Path:
    shape = replace(SHAPE, patch_size=patch, embed_dim=embed_dim, in_chans=channels)
    torch.manual_seed(seed)
    card = replace(CARD, backbone=shape, mean=(0.5,) * channels, std=(0.2,) * channels)
    save_backbone(path, build_backbone(**vars(shape)).state_dict(), card)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two networks of other widths and patches."""
    folder = tmp_path_factory.mktemp("weights")
    return [
        save_weights(folder / "a.safetensors", seed=1),
        save_weights(folder / "b.safetensors", seed=2, patch=4, embed_dim=32),
    ]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Six frames, of which three in turn are equal."""
    for i in range(6):
        save_picture(tmp_path / "frames" / f"{i:05d}.png", seed=i % 2, size=(SIDE, SIDE))
    return tmp_path / "frames"


def _animate(weights: list[Path], video: Path, out: Path, **more: Any) -> dict[str, Any]:
    how = {"also": weights[1:], "size": SIDE, "options": OPTIONS, **more}
    return as_json(animate_pca(weights[0], str(video), out, **how))


def _frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as opened:
        found = []
        for i in range(opened.n_frames):
            opened.seek(i)
            found.append(np.asarray(opened.convert("RGB")).astype(int))
        return found


def test_a_planted_rotation_is_found_and_adds_nothing() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=(500, 3)) @ np.diag([9.0, 4.0, 1.0]) + 5
    uncorrelated = np.linalg.qr(target - target.mean(axis=0))[0] * np.sqrt(len(target))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    for mirrored in (turn, turn * [-1, 1, 1]):
        own = (uncorrelated @ mirrored.T).astype(np.float32)
        mixture, agreement = turn_to(own, uncorrelated.astype(np.float32))
        assert agreement == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(own @ mixture, uncorrelated, atol=1e-5)
    noise = rng.normal(size=target.shape).astype(np.float32)
    mixture, agreement = turn_to(noise, target.astype(np.float32))
    assert agreement < 0.2  # three components of noise cannot be turned into those of the target
    rotation = noise.std(axis=0)[:, None] * mixture / target.std(axis=0)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)


def test_agreement_is_the_mean_correlation_even_of_correlated_columns() -> None:
    rng = np.random.default_rng(2)
    target = rng.normal(size=(400, 3)).astype(np.float32)
    own = (target @ [[1, 0.8, 0], [0, 1, 0.5], [0, 0, 1]] + rng.normal(size=(400, 3))).astype("f4")
    mixture, agreement = turn_to(own, target)
    turned = own @ mixture
    exact = [np.corrcoef(turned[:, i], target[:, i])[0, 1] for i in range(3)]
    assert agreement == pytest.approx(np.mean(exact), abs=1e-6)
    assert np.isfinite(mixture).all()
    assert turn_to(np.ones((9, 3), np.float32), target[:9])[1] == 0


def test_signs_and_order_of_components_do_not_matter() -> None:
    """Of the same features in other coordinates, the colors are the same."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(200, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)
    coordinates = np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32)
    first, second = (fit_basis([x]).project(x) for x in (features, -features @ coordinates))
    mixture, agreement = turn_to(second[:, [2, 0, 1]], first)
    assert agreement == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(second[:, [2, 0, 1]] @ mixture, first, atol=1e-3)


def test_grids_meet_where_their_patches_lie_in_the_image() -> None:
    """A ramp over pixels is the same ramp on any grid; both begin at the upper left corner."""
    rows, columns = np.meshgrid(4 * np.arange(9) + 2, 4 * np.arange(7) + 2, indexing="ij")
    fine = np.stack([rows, columns], axis=-1).astype(np.float32)  # centers of patches of 4
    coarse = resample(fine, 4, grid=(4, 3), to_patch=8)
    assert coarse[:, 0, 0].tolist() == [4, 12, 20, 28]
    assert coarse[0, :, 1].tolist() == [4, 12, 20]
    assert np.array_equal(resample(fine, 4, grid=(9, 7), to_patch=4, mode="nearest"), fine)


def test_weights_stand_side_by_side_in_colors_of_the_first(
    tmp_path: Path, weights: list[Path]
) -> None:
    for i in range(3):
        save_picture(tmp_path / "in" / f"{i}.png", seed=i, size=(40, 48))
    how = {"size": SIDE, "options": OPTIONS, "foreground": True}
    alone = evaluate_pca(weights[0], str(tmp_path / "in"), tmp_path / "alone", **how)
    copy = weights[0].with_name("copy.safetensors")
    copy.write_bytes(weights[0].read_bytes())
    also = [copy, weights[1]]
    report = as_json(
        evaluate_pca(weights[0], str(tmp_path / "in"), tmp_path / "out", also=also, **how)
    )
    same, other = report.pop("also")
    assert report["score"] == alone["score"]
    assert same["agreement"] == pytest.approx(1, abs=1e-6)
    assert 0 < other["agreement"] < 0.99
    files = [tmp_path / "alone"] + [
        tmp_path / "out" / name for name in ("1-a.safetensors", "2-copy.safetensors")
    ]
    one, first, second = (np.asarray(Image.open(folder / "1" / "pca.png")) for folder in files)
    assert np.array_equal(one, first)  # the first weights look as alone
    assert np.abs(second.astype(int) - first).max() <= 1  # of rounding
    for name, patch in (("1-a.safetensors", 8), ("3-b.safetensors", 4)):
        _require_one_scale(tmp_path / "out" / name, patch)
    assert np.load(tmp_path / "out" / "3-b.safetensors" / BASIS)["components"].shape == (3, 32)
    sheet = Image.open(tmp_path / "out" / "pca-sheet.png")
    assert sheet.size == (4 * 320 + 3 * 4, 20 + 3 * 244 - 4)


def _require_one_scale(folder: Path, patch: int) -> None:
    """Over all images together, a larger component is never darker."""
    components, colors = [], []
    for image in "012":
        raw = np.load(folder / image / "pca.npz")
        with Image.open(folder / image / "pca.png") as picture:
            patches = np.asarray(picture)[::patch, ::patch]
        assert (patches[~raw["foreground"]] == 0).all()
        components.append(raw["components"][raw["foreground"]])
        colors.append(patches[raw["foreground"]].astype(int))
    order = np.concatenate(components).argsort(axis=0)
    rising = np.take_along_axis(np.concatenate(colors), order, axis=0)
    assert (np.diff(rising, axis=0) >= 0).all()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A network; the same function in other coordinates and patches; and another network.

    Neither of the first two has positions or attention: each of their patches is for itself. The
    second one's are half as large, and its kernels are the mean of the first one's: of pictures
    of squares as large as the patches of the first one, both compute the same. The channels of its
    features are permuted, and half of them have the other sign.
    """
    folder = tmp_path_factory.mktemp("three")
    shapes = [SHAPE, replace(SHAPE, patch_size=4)]
    torch.manual_seed(3)
    first = build_backbone(**vars(SHAPE)).state_dict()
    for name in ("pos_embed", "blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias"):
        first[name].zero_()
    first["patch_embed.proj.weight"] *= 10  # else the bias of the norm decides
    order, signs = torch.randperm(64), torch.ones(64)
    signs[::2] = -1
    second = dict(first)
    for name, value in first.items():
        if name in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"):  # read the features
            second[name] = value[:, order]
        elif name.startswith(("patch_embed", "norm", "blocks.0.norm", "blocks.0.mlp.fc2")):
            second[name] = value[order]
    second["cls_token"] = first["cls_token"][..., order]
    second["patch_embed.proj.weight"] = (
        second["patch_embed.proj.weight"].mean(dim=(2, 3), keepdim=True).expand(-1, -1, 4, 4) * 4
    ).contiguous()
    second["pos_embed"] = torch.zeros(1, 65, 64)
    for name in ("norm.weight", "norm.bias"):
        second[name] = second[name] * signs
    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    for path, shape, state in zip(paths, shapes, (first, second), strict=True):
        save_backbone(path, state, replace(CARD, backbone=shape))
    torch.manual_seed(2)
    shape = replace(SHAPE, patch_size=4, embed_dim=32)
    other = build_backbone(**vars(shape)).state_dict()
    other["blocks.0.attn.qkv.weight"] *= 5  # attention that differs between patches
    save_backbone(folder / "c.safetensors", other, replace(CARD, backbone=shape))
    return [*paths, folder / "c.safetensors"]


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of squares of 8 pixels, brighter in the middle."""
    folder = tmp_path_factory.mktemp("squares")
    for i in range(3):
        colors = np.random.default_rng(i).integers(0, 100, (4, 6, 3), dtype=np.uint8)
        colors[1:3, 1:5] += 120
        Image.fromarray(colors.repeat(8, axis=0).repeat(8, axis=1)).save(folder / f"{i:05d}.png")
    return folder


def _columns(sheet: str) -> list[list[np.ndarray]]:
    """The pictures of each of three rows of a sheet of wide pictures."""
    pixels, (width, height) = np.asarray(Image.open(sheet)).astype(int), (320, 213)
    return [
        [
            pixels[top : top + height, left : left + width]
            for left in range(0, pixels.shape[1], width + 4)
        ]
        for top in (20 + row * (height + 4) for row in range(3))
    ]


def test_each_column_is_of_its_network_in_colors_of_the_first(
    tmp_path: Path, three: list[Path], squares: Path
) -> None:
    how: dict[str, Any] = {"also": three[1:], "size": SIDE, "foreground": True, "options": OPTIONS}
    still = as_json(evaluate_pca(three[0], str(squares), tmp_path / "still", **how))
    moving = as_json(animate_pca(three[0], str(squares), tmp_path / "moving", **how))
    folders = ["1-a.safetensors", "2-b.safetensors", "3-c.safetensors"]
    raws = [np.load(tmp_path / "moving" / name / "squares0-pca.npz") for name in folders]
    values = [raw["components"] for raw in raws]
    front = raws[0]["foreground"]
    low, high = np.percentile(values[0][front], (1, 99), axis=0)
    assert 0 < front.mean() < 1
    for row, pictures in enumerate(
        zip(_columns(moving["picture"]), _columns(still["picture"]), strict=True)
    ):
        for column, raw in enumerate(raws):
            bright = ((raw["components"][row] - low) / (high - low)).clip(0, 1)
            color = (255 * bright * raw["foreground"][row][..., None]).round().astype(np.uint8)
            of_frame = Image.fromarray(color).resize((320, 213), Image.Resampling.NEAREST)
            of_image = Image.fromarray(color).resize((48, 32), Image.Resampling.NEAREST)
            for found, drawn in zip(pictures, (of_frame, of_image.resize((320, 213))), strict=True):
                assert np.abs(found[1 + column] - np.asarray(drawn)).max() <= 1
        for of in pictures:
            assert np.abs(of[2] - of[1]).max() <= 2  # the same function
            assert np.abs(of[3] - of[1]).mean() > 2  # another one
    for raw in raws[1:]:
        assert np.array_equal(raw["foreground"], front.repeat(2, axis=1).repeat(2, axis=2))
    for report in (still, moving):
        same, other = (of["agreement"] for of in report["also"])
        assert same == pytest.approx(1, abs=1e-5)
        # The center of a large patch is the corner of four small ones.
        coarse = values[2].reshape(3, 4, 2, 6, 2, 3).mean(axis=(2, 4))[front]
        exact = [np.corrcoef(coarse[:, i], values[0][front][:, i])[0, 1] for i in range(3)]
        assert other == pytest.approx(np.mean(exact), abs=1e-5)
        floors = [of["floors"] for of in report["also"]]
        assert [sorted(of) for of in floors] == [["other_images", "untrained"]] * 2
        # Image 1 stands for 0, 2 for 1, 0 for 2; the second network sees what the first does.
        wrong = turn_to(values[0][[1, 2, 0]][front], values[0][front])[1]
        assert floors[0]["other_images"] == pytest.approx(wrong, abs=1e-3)
        assert all(
            0 < of["other_images"] < 0.7 * agreed
            for of, agreed in zip(floors, (same, other), strict=True)
        )
        assert 0 < floors[0]["untrained"] < 0.99


def test_attention_in_a_column_is_of_its_network_on_the_scale_of_all(
    tmp_path: Path, three: list[Path], squares: Path
) -> None:
    weights, how = [three[0], three[2]], {"also": three[2:], "size": SIDE, "options": OPTIONS}
    still = as_json(write_attention(weights[0], str(squares), tmp_path / "still", **how))
    moving = as_json(animate_attention(weights[0], str(squares), tmp_path / "moving", **how))
    means = [
        np.load(tmp_path / "moving" / name / "squares0-attention.npz")["maps"]
        for name in ("1-a.safetensors", "2-c.safetensors")
    ]
    multiples = [of / of.mean(axis=(1, 2), keepdims=True) for of in means]
    high = np.percentile(np.concatenate([of.ravel() for of in multiples]), 99)
    assert abs(np.percentile(multiples[0], 99) / high - 1) > 0.01  # it is not that of one network
    for sheet in (still, moving):
        for row, (image, *columns) in enumerate(_columns(sheet["picture"])):
            for found, of in zip(columns, multiples, strict=True):
                brightness = (of[row] / high).clip(0, 1).astype(np.float32)
                drawn = heat_overlay(Image.fromarray(image.astype(np.uint8)), brightness)
                assert np.abs(found - np.asarray(drawn)).max() <= 3  # steps of the color map


def test_columns_show_what_all_networks_see(tmp_path: Path, three: list[Path]) -> None:
    """Of 44 pixels, patches of 8 pixels see 40: the other network's last column is cut off."""
    picture = save_picture(tmp_path / "in" / "00000.png", seed=5, size=(44, SIDE))
    how: dict[str, Any] = {"also": three[:1], "size": SIDE, "options": OPTIONS}
    seen = Image.open(picture).crop((0, 0, 40, SIDE)).resize((300, 240))
    for draw_all, name, key in (
        (animate_pca, "in-pca", "components"),
        (evaluate_pca, "00000/pca", "components"),
        (animate_attention, "in-attention", "maps"),
        (write_attention, "00000/attention", "maps"),
    ):
        out = tmp_path / draw_all.__name__
        report = as_json(draw_all(three[2], str(tmp_path / "in"), out, **how))
        sheet = np.asarray(Image.open(report["picture"])).astype(int)[20:]
        frame, *columns = (sheet[:, at : at + 300] for at in (10, 334, 658))  # centered in 320
        assert np.array_equal(frame, np.asarray(seen))
        raws = [
            np.load(out / of / f"{name}.npz")[key] for of in ("1-c.safetensors", "2-a.safetensors")
        ]
        if name.startswith("in"):
            raws = [raw[0] for raw in raws]
        if key == "components":
            ends = np.percentile(raws[0].reshape(-1, 3), (1, 99), axis=0)
            bright = [255 * ((raw - ends[0]) / (ends[1] - ends[0])).clip(0, 1) for raw in raws]
        else:
            means = [raw.mean(axis=0) if raw.ndim == 3 else raw for raw in raws]
            multiples = [mean / mean.mean() for mean in means]
            high = np.percentile(np.concatenate([of.ravel() for of in multiples]), 99)
            bright = [(of / high).clip(0, 1) for of in multiples]
        for column, values, patch in zip(columns, bright, (4, 8), strict=True):
            pixels = values.repeat(patch, axis=0).repeat(patch, axis=1)[:, :40].astype(np.float32)
            if key == "maps":
                drawn = np.asarray(heat_overlay(seen, pixels)).astype(int)
                assert np.abs(column - drawn).max() <= 3
            else:  # in the middle of each patch, where enlarging does not blur
                at = (np.arange(0, 40, patch) + patch / 2) * 7.5
                middle = column[np.ix_(at[: SIDE // patch].astype(int), at.astype(int))]
                assert np.abs(middle - pixels[patch // 2 :: patch, patch // 2 :: patch]).max() <= 16


def test_an_image_that_one_network_cannot_use_is_left_out_of_all(
    tmp_path: Path, three: list[Path], squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoscale.evaluate.any_size.MAX_PATCHES", 100)
    folder = tmp_path / "in"
    shutil.copytree(squares, folder)
    save_picture(folder / "00000a.png", seed=7, size=(96, 32))  # 192 small patches, 48 large
    how: dict[str, Any] = {"also": three[2:], "size": SIDE, "options": OPTIONS}
    reports = [
        as_json(evaluate_pca(three[0], str(spec), tmp_path / name, **how))
        for spec, name in ((squares, "few"), (folder, "all"))
    ]
    reports.append(as_json(write_attention(three[0], str(folder), tmp_path / "maps", **how)))
    assert [report["images"] for report in reports] == [3, 3, 3]
    few, *alike = [report["left_out"] for report in reports]
    assert few == []
    for (said,) in alike:
        assert "00000a.png: 96 x 32 pixels become 24 x 8 patches" in said
    bases = [np.load(tmp_path / name / "1-a.safetensors" / BASIS) for name in ("few", "all")]
    for key in ("mean", "components"):
        assert np.array_equal(bases[0][key], bases[1][key])
    assert not (tmp_path / "maps" / "1-a.safetensors" / "00000a").exists()
    monkeypatch.setattr("dinoscale.evaluate.any_size.MAX_PATCHES", 50)
    with pytest.raises(DataError, match=r"no image can be used by all weights; .*00000\.png"):
        evaluate_pca(three[0], str(squares), tmp_path / "none", **how)


def test_an_animation_has_all_frames_and_equal_colors_of_equal_frames(
    tmp_path: Path, weights: list[Path], video: Path
) -> None:
    report = _animate(weights, video, tmp_path / "out", fps=4)
    (file,) = report["animations"]
    assert file == str(tmp_path / "out" / "frames-pca.webp")
    assert (report["images"], report["left_out"]) == (6, [])
    frames = _frames(Path(file))
    assert len(frames) == 6
    assert frames[0].shape == (20 + 240, 3 * 244 - 4, 3)
    with Image.open(file) as opened:
        opened.load()
        assert opened.info["duration"] == 250
    raw = np.load(tmp_path / "out" / "2-b.safetensors" / "frames-pca.npz")
    assert raw["components"].shape == (6, 8, 8, 3)
    for i in range(2, 6):
        assert np.array_equal(raw["components"][i], raw["components"][i - 2])
        # Lossy, and differently after other frames.
        assert np.abs(frames[i] - frames[i - 2]).mean() < 0.2 * np.abs(frames[1] - frames[0]).mean()
    again = _animate(weights, video, tmp_path / "again", fps=4)
    assert Path(again["animations"][0]).read_bytes() == Path(file).read_bytes()


def test_attention_of_all_weights_is_on_one_scale(
    tmp_path: Path, weights: list[Path], video: Path
) -> None:
    how = {"also": weights[1:], "size": SIDE, "options": OPTIONS}
    report = as_json(animate_attention(weights[0], str(video), tmp_path / "out", **how))
    (file,) = report["animations"]
    assert len(_frames(Path(file))) == 6
    assert [of["weights"] for of in report["also"]] == [str(weights[1])]
    maps = np.load(tmp_path / "out" / "1-a.safetensors" / "frames-attention.npz")["maps"]
    assert maps.shape == (6, 4, 4)
    assert (maps[0] == maps[2]).all()
    flat, peaked = np.full((2, 2), 0.1, np.float32), np.array([[1, 1], [1, 5]], np.float32)
    high = scale_of([flat, flat, peaked])
    assert 1 < high < 5 / 2
    np.testing.assert_allclose(on_scale(flat, high), on_scale(3 * flat, high), rtol=1e-6)
    assert (on_scale(flat, high) > on_scale(peaked, high)[0, 0]).all()
    write_attention(weights[0], str(video), tmp_path / "images", limit=2, **how)
    sheet = Image.open(tmp_path / "images" / "attention-sheet.png")
    assert sheet.size == (3 * 324 - 4, 20 + 2 * 244 - 4)
    assert (tmp_path / "images" / "2-b.safetensors" / "00001" / "attn-mean.png").exists()


def test_files_and_tars_are_videos_too(tmp_path: Path, weights: list[Path], video: Path) -> None:
    frames = [Image.open(path) for path in sorted(video.iterdir())]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:4], duration=40)
    frames[0].save(tmp_path / "one.png")
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for number, path in enumerate([*sorted(video.iterdir())[:4]]):
            tar.add(path, f"s{number // 2}/{number:05d}.png")
    counts = {"x.gif": [4], "one.png": [1], "two.tar": [2, 2]}
    for name, expected in counts.items():
        report = _animate(weights[:1], tmp_path / name, tmp_path / "out" / name)
        assert [len(_frames(Path(file))) for file in report["animations"]] == expected
    with Image.open(tmp_path / "out" / "x.gif" / "x-pca.webp") as opened:
        opened.load()
        assert opened.info["duration"] == 40


def test_damaged_frames_and_those_of_another_size_are_left_out(
    tmp_path: Path, weights: list[Path], video: Path
) -> None:
    (video / "00002.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    save_picture(video / "00003.png", seed=0, size=(SIDE, 2 * SIDE))
    report = _animate(weights, video, tmp_path / "out")
    damaged, other = report["left_out"]
    assert "00002.png" in damaged
    assert "00003.png: has 32 x 64 pixels, the frames before it 32 x 32" in other
    assert len(_frames(Path(report["animations"][0]))) == 4
    raw = np.load(tmp_path / "out" / "1-a.safetensors" / "frames-pca.npz")
    assert raw["frames"].tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("animate", [animate_pca, animate_attention])
def test_a_video_of_damaged_frames_is_left_out(
    tmp_path: Path, weights: list[Path], animate: Callable[..., dict[str, object]]
) -> None:
    for name in ("run.1", "run.2", "run.3"):
        for i in range(2):
            picture = save_picture(tmp_path / "in" / name / f"{i}.png", seed=i, size=(SIDE, SIDE))
            if name == "run.2":
                picture.write_bytes(b"\x89PNG\r\n\x1a\n")
    how = {"size": SIDE, "options": OPTIONS}
    report = as_json(animate(weights[0], str(tmp_path / "in"), tmp_path / "out", **how))
    written = [*report["animations"], *map(str, sorted((tmp_path / "out").glob("run*.npz")))]
    assert [Path(file).name.split("-")[0] for file in written] == ["run.1", "run.3"] * 2
    assert report["left_out"][2:] == ["run.2: none of its frames can be used"]
    assert report["images"] == 4
    with pytest.raises(DataError, match="no image can be used"):
        animate(weights[0], str(tmp_path / "in" / "run.2"), tmp_path / "none", **how)


def test_what_is_no_video_is_refused(tmp_path: Path, weights: list[Path], video: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no videos"):
        _animate(weights, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "a b.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(99))
    with pytest.raises(DataError, match=r"MP4 family.*ffmpeg -i '.*a b\.mp4' frames/%05d\.png"):
        _animate(weights, tmp_path / "a b.mp4", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"fps: .* got 0"):
        _animate(weights, tmp_path, tmp_path / "out", fps=0)
    with pytest.raises(ConfigError, match=r"a\.safetensors is given twice"):
        _animate([weights[0], weights[0]], tmp_path, tmp_path / "out")
    four = save_weights(tmp_path / "four.safetensors", seed=1, channels=4)
    with pytest.raises(ConfigError, match="pictures of 1 or 3 channels, not 4"):
        _animate([weights[0], four], video, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    nothing = str(tmp_path / "nothing")
    for more, says in (
        (["--out", "x", "--fps", "3"], "--fps has a meaning with --video only"),
        (["x.png", "--also", str(weights[1])], "--also needs a folder"),
        (["x.png", "--mass", "0.3"], "--mass needs a folder"),
        (["x.png", "--limit", "0"], "--limit needs a folder"),
        (["--out", "x", "--video", "--mass", "0.3"], "--mass has no meaning with --video"),
    ):
        with pytest.raises(ConfigError, match=says):
            cli.run(["evaluate", "attention", str(weights[0]), nothing, *more])


def test_other_weights_are_inputs_of_the_report() -> None:
    options = {
        "weights": "a",
        "images": "in",
        "also": ["b", "c"],
        "out": "out",
        "network": "teacher",
    }
    assert input_specs(options) == {"weights": "a", "images": "in", "also.0": "b", "also.1": "c"}


def test_long_titles_are_cut_at_their_start(tmp_path: Path) -> None:
    table = draw_table(["short", "x" * 500], [[Image.new("RGB", (9, 9), "red")] * 2], 40)
    assert table.size == (84, 29)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "red", "blue")]
    save_animation(lambda i: frames[i], 3, tmp_path / "x.webp", fps=10)
    assert len(_frames(tmp_path / "x.webp")) == 2  # equal ones are one, shown longer
    with Image.open(tmp_path / "x.webp") as opened:
        opened.load()
        assert opened.info["duration"] == 200
