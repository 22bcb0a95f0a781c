"""Attention of images of any size as files: correct patches and pixels, and no image lost."""

from __future__ import annotations

import json
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
from dinoscale.evaluate.any_size import MAX_PATCHES, Fit, NamedFolders
from dinoscale.evaluate.dense.attention_figure import DIMMED
from dinoscale.evaluate.dense.attention_files import SHEET, write_attention
from dinoscale.evaluate.dense.attention_maps import enlarge, keep_mass
from dinoscale.models.zoo import build_backbone
from dinoscale.runtime.outputs import LIST_FILE

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
HEADS = 3


def save_weights(path: Path, name: str = "vit_tiny_patch16_224") -> Path:
    """A small ViT with patches of 8 pixels; or another architecture as it is."""
    sizes = {} if name == "resnet50" else {"patch_size": 8, "embed_dim": 48, "depth": 2}
    heads = {} if name == "resnet50" else {"num_heads": HEADS}
    shape = BackboneShape(name, img_size=32, **sizes, **heads)
    torch.manual_seed(1)
    state = build_backbone(name, img_size=32, **sizes, **heads).state_dict()
    save_backbone(path, state, BackboneCard(shape, MEAN, STD, resize=32, crop=32, source="test"))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


def draw(path: Path, *, width: int, height: int, seed: int = 0) -> Path:
    """A smooth picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def test_maps_keep_the_shape_of_the_image_and_are_the_last_blocks(
    tmp_path: Path, weights: Path
) -> None:
    image = draw(tmp_path / "wide.png", width=101, height=50)
    report = write_attention(weights, str(image), tmp_path / "out", size=34, mass=0.6)
    assert json.loads(json.dumps(report)) == report
    raw = np.load(tmp_path / "out" / "wide" / "attention.npz")
    assert (raw["size"].tolist(), raw["seen"].tolist()) == ([50, 101], [32, 64])
    assert (int(raw["patch"]), str(raw["name"])) == (8, str(image))
    backbone, _ = load_backbone(weights)
    seen = np.asarray(Image.open(image).resize((68, 34), Image.Resampling.BICUBIC))[:32, :64]
    pixels = torch.from_numpy((seen / 255 - MEAN) / STD).float().permute(2, 0, 1)[None]
    rows = backbone.last_attention(pixels)[0, :, 0]  # type: ignore[operator]  # of the ViT
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(HEADS))
    expected = rows[:, 1:].reshape(HEADS, 4, 8)
    torch.testing.assert_close(torch.from_numpy(raw["maps"]), expected)
    assert np.array_equal(raw["kept"], keep_mass(torch.from_numpy(raw["maps"])).numpy())


def test_registers_are_left_out(tmp_path: Path) -> None:
    weights = save_weights(tmp_path / "w.safetensors", "vit_small_patch14_reg4_dinov2")
    draw(tmp_path / "in" / "a.png", width=40, height=64)
    write_attention(weights, str(tmp_path / "in"), tmp_path / "out", size=16)
    maps = np.load(tmp_path / "out" / "a" / "attention.npz")["maps"]
    assert maps.shape == (HEADS, 3, 2)
    backbone, _ = load_backbone(weights)
    image = Image.open(tmp_path / "in" / "a.png").resize((16, 25), Image.Resampling.BICUBIC)
    seen = np.asarray(image)[:24]
    pixels = torch.from_numpy((seen / 255 - MEAN) / STD).float().permute(2, 0, 1)[None]
    row = backbone.last_attention(pixels)[0, :, 0]  # type: ignore[operator]  # of the ViT
    assert row.shape == (HEADS, 1 + 4 + 6)
    torch.testing.assert_close(torch.from_numpy(maps).flatten(1), row[:, 5:])


def test_overlays_show_patches_in_their_positions(tmp_path: Path, weights: Path) -> None:
    draw(tmp_path / "in" / "a.png", width=64, height=32)
    write_attention(weights, str(tmp_path / "in"), tmp_path / "out", size=32, mass=0.5)
    folder = tmp_path / "out" / "a"
    names = [*(f"head{head}" for head in range(HEADS)), "mean"]
    expected = {f"{kind}-{name}.png" for kind in ("attn", "mass") for name in names}
    assert {path.name for path in folder.iterdir()} == {*expected, "attention.npz", LIST_FILE}
    seen = np.asarray(Image.open(tmp_path / "in" / "a.png"))  # needs no resize
    raw = np.load(folder / "attention.npz")
    for name, kept in zip(names, raw["kept"], strict=False):
        bright = np.kron(kept, np.ones((8, 8)))[..., None]
        shown = np.asarray(Image.open(folder / f"mass-{name}.png"))
        assert np.array_equal(shown, np.where(bright, seen, (seen * DIMMED).astype(np.uint8)))
    heat = np.asarray(Image.open(folder / "attn-head0.png")).astype(int).sum(-1)
    strongest = np.unravel_index(raw["maps"][0].argmax(), (4, 8))
    weakest = np.unravel_index(raw["maps"][0].argmin(), (4, 8))
    patches = heat.reshape(4, 8, 8, 8).mean(axis=(1, 3))
    assert patches[strongest] > patches[weakest] + 100
    assert (tmp_path / "out" / SHEET).stat().st_size > 2000


def test_square_squeezes_as_the_reference(tmp_path: Path, weights: Path) -> None:
    image = draw(tmp_path / "a.png", width=90, height=40)
    write_attention(weights, str(image), tmp_path / "out", size=34, square=True)
    assert np.load(tmp_path / "out" / "a" / "attention.npz")["maps"].shape == (HEADS, 4, 4)


def test_unusable_images_are_named_and_the_others_written(
    tmp_path: Path, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = tmp_path / "in"
    draw(images / "b.png", width=30, height=30)
    (images / "a.jpg").write_bytes(b"no image")
    draw(images / "c.png", width=1, height=MAX_PATCHES)
    report = write_attention(weights, str(images), tmp_path / "out", size=32)
    assert report["images"] == 1
    broken, endless = report["left_out"]  # type: ignore[misc]  # a list of texts
    assert "a.jpg" in broken
    assert "c.png" in endless
    assert "patches" in endless
    assert broken in caplog.text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [LIST_FILE, SHEET, "b"]
    (images / "b.png").unlink()
    with pytest.raises(DataError, match=r"no image can be used; the first: .*a\.jpg"):
        write_attention(weights, str(images), tmp_path / "out", size=32)


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    folders = NamedFolders(tmp_path)
    paths = ("/x/cat.jpg", "/y/cat.png", "/s.tar::z/Cat.jpg", "/a b/../..", "/n/d\n!e.f.jpg", "/h")
    made = [folders.make(path).name for path in paths]
    assert made == ["cat", "cat-2", "Cat-3", "image", "d_e.f", "h"]
    assert all((tmp_path / name).is_dir() for name in made)


def test_bad_settings_are_refused_before_anything_is_written(tmp_path: Path, weights: Path) -> None:
    image = str(draw(tmp_path / "a.png", width=16, height=16))
    with pytest.raises(ConfigError, match="one patch of 8 pixels, got 7"):
        write_attention(weights, image, tmp_path / "out", size=7)
    with pytest.raises(ConfigError, match=r"mass: .* got 0"):
        write_attention(weights, image, tmp_path / "out", mass=0)
    with pytest.raises(ConfigError, match="limit: need at least one image, got 0"):
        write_attention(weights, image, tmp_path / "out", limit=0)
    resnet = save_weights(tmp_path / "r.safetensors", "resnet50")
    with pytest.raises(ConfigError, match="need a ViT, this is a ConvNet"):
        write_attention(resnet, image, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"cannot write to .*a\.png"):
        write_attention(weights, image, image, size=16)


def test_enlarging_takes_the_patch_under_the_center_of_a_pixel() -> None:
    maps = torch.tensor([[1, 2, 3]])
    assert enlarge(maps, height=2, width=6).tolist() == [[1, 1, 2, 2, 3, 3]] * 2
    assert enlarge(maps, height=1, width=5).tolist() == [[1, 1, 2, 3, 3]]
    assert enlarge(maps, height=1, width=2).tolist() == [[1, 3]]
    grid = torch.randint(0, 99, (7, 5), generator=torch.Generator().manual_seed(0))
    by_pillow = Image.fromarray(grid.numpy().astype(np.uint8)).resize((83, 61), 0)
    assert np.array_equal(enlarge(grid, height=61, width=83).numpy(), np.asarray(by_pillow))


def test_the_long_side_follows_the_short_one() -> None:
    fit = Fit(16, 480)
    assert fit.grid(640, 480) == (30, 40)
    assert fit.grid(375, 500) == (40, 30)
    assert fit.cut(Image.new("RGB", (375, 500))).size == (480, 640)
    assert fit.squeeze(Image.new("RGB", (400, 333))).size == (576, 480)
    assert Fit(14, 480, square=True).grid(640, 10) == (34, 34)
    with pytest.raises(DataError, match="900 pixels become 30 x 27000 patches"):
        fit.grid(1, 900)


def test_the_command_writes_a_sheet_or_a_folder(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = draw(tmp_path / "in" / "a.png", width=32, height=40)
    command = ["evaluate", "attention", str(weights), str(image.parent)]
    cli.run([*command, str(tmp_path / "sheet.png")])
    assert json.loads(capsys.readouterr().out)["picture"] == str(tmp_path / "sheet.png")
    cli.run([*command, "--out", str(tmp_path / "out"), "--size", "16", "--mass", "0.8"])
    report = json.loads(capsys.readouterr().out)
    assert (report["protocol"]["size"], report["protocol"]["mass"]) == (16, 0.8)
    assert (tmp_path / "out" / "a" / "attn-mean.png").exists()
    with pytest.raises(SystemExit, match="2"):
        cli.run(command)
