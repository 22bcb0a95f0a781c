"""Recipes: what is seen of a set, what is chosen for it, and the file that is written."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.set_facts import SetFacts, look_at
from dinoscale.cli import run
from dinoscale.config import RunConfig, load_config, phases_of, resolve
from dinoscale.config.resolve import without_auto
from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.convert.run_checkpoint import card_of
from dinoscale.data.decoding.decode import Picture, UnavailableSampleError
from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.models.rope import Rope
from dinoscale.recipe.cautions import least_share_of_copies
from dinoscale.recipe.choose import choose, prototypes
from dinoscale.recipe.preset import Recipe
from dinoscale.recipe.write import as_yaml, next_command
from tests.unit.data.many_channels import npy, pixels, png, tiff

IMAGENET = SetFacts(
    spec="/data/images",
    images=1_281_167,
    sample=1000,
    unreadable=0,
    short_side=(333, 375),
    channels=3,
    other_channels=0,
    arrays=0,
    colorless=0.01,
    max_pixel_value=None,
    mixed_scales="",
    copies=0,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    classes=0,
)
RGB_CARD = card_of(load_config("dinov2_vits16"), source="a run")
CIFAR = replace(IMAGENET, images=50_000, short_side=(32, 32), classes=10)


def _chosen(facts: SetFacts, **options: object) -> dict[str, object]:
    return _values(choose(facts, **options))  # type: ignore[arg-type]


def _values(recipe: Recipe) -> dict[str, object]:
    return {setting.key: setting.value for setting in recipe.settings}


def _on(facts: SetFacts, card: BackboneCard) -> Recipe:
    """The recipe that goes on from weights."""
    return choose(facts, weights="w", card=card)


def _resolved(
    folder: Path, facts: SetFacts, *, gpus: int = 1, card: BackboneCard | None = None
) -> RunConfig:
    """The run of a recipe, loaded from its file and resolved."""
    recipe = choose(facts, gpus=gpus, weights=card and "w", card=card)
    path = folder / "recipe.yaml"
    path.write_text(as_yaml(recipe, facts, run_dir="runs/recipe"))
    config = load_config(str(path))
    resolve(without_auto(config), world_size=gpus, num_images=facts.images)
    return config


def _noise(folder: Path, *, images: int, side: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(images):
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side + 10, side), Image.Resampling.BICUBIC).save(
            folder / f"{index:03}.png"
        )


def test_imagenet_gets_the_published_recipe_and_cifar_that_of_the_sweep() -> None:
    chosen = _chosen(IMAGENET)
    assert choose(IMAGENET).base == "vit_s16"
    assert (chosen["head.num_prototypes"], chosen["train.batch_size"]) == (65536, 1024)
    assert not {"model.patch_size", "crops.global_size", "dino.momentum"} & chosen.keys()
    assert choose(replace(IMAGENET, images=2_000_000)).base == "vit_b16"
    cifar, small = _chosen(CIFAR), load_config("vit_s16", ["crops.num_local=6"])
    assert small.head.num_prototypes == 65536  # so the values below are the recipe's own
    assert (cifar["head.num_prototypes"], cifar["train.batch_size"]) == (4096, 256)
    assert (cifar["model.patch_size"], cifar["crops.global_size"]) == (4, 32)
    assert cifar["dino.momentum"] == 0.9995


@pytest.mark.parametrize(("images", "number"), [(1, 1024), (50_000, 4096), (10**9, 65536)])
def test_prototypes_are_a_power_of_two_in_a_range(images: int, number: int) -> None:
    assert prototypes(images) == number


@pytest.mark.parametrize("going_on", [False, True])
def test_a_step_divides_over_the_gpus(tmp_path: Path, going_on: bool) -> None:
    card = RGB_CARD if going_on else None
    for number, (images, gpus) in enumerate(
        ((50_000, 1), (50_000, 7), (50_000, 128), (50_000, 1000), (900, 3), (90, 6), (30, 7))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = _resolved(folder, replace(CIFAR, images=images), gpus=gpus, card=card)
        assert config.train.batch_size % gpus == 0
        assert config.train.batch_size <= images
    with pytest.raises(ConfigError, match="--gpus 0: need at least 1"):
        choose(CIFAR, gpus=0)
    too_many = r"--gpus 64: a step takes (64|256) images or more, of 60; use (60|15) GPUs or fewer"
    with pytest.raises(ConfigError, match=too_many):
        choose(replace(CIFAR, images=60), gpus=64, weights=card and "w", card=card)
    with pytest.raises(ConfigError, match="of 3; add images"):
        choose(replace(CIFAR, images=3), weights="w", card=RGB_CARD)


def test_a_set_is_warned_about() -> None:
    facts = replace(
        CIFAR,
        images=900,
        sample=900,
        copies=40,
        unreadable=30,
        channels=1,
        arrays=5,
        other_channels=2,
    )
    cautions = "\n".join(choose(facts).cautions)
    for part in ("900 images are few", "40 of 900", "30 of 900", "other channels", "10 classes"):
        assert part in cautions
    assert not choose(replace(IMAGENET, sample=8000)).cautions


@pytest.mark.parametrize("of_one", [0.003, None])  # a placeholder; None: each image twice
def test_a_set_has_as_many_copies_as_is_said_of_it_at_least(of_one: float | None) -> None:
    rng, whole, read = np.random.default_rng(0), 1_000_000, 1000
    share, least = of_one or 0.5, []
    for _ in range(100):
        if of_one:
            copies = max(rng.binomial(read, of_one) - 1, 0)
        else:
            originals = rng.choice(whole, read, replace=False) // 2
            copies = read - len(np.unique(originals))
        facts = replace(IMAGENET, images=whole, copies=copies)
        least.append(least_share_of_copies(facts) <= share)
    assert np.mean(least) >= 0.92  # 97 % less three standard errors


def test_copies_are_shown_and_not_made_more_than_they_are() -> None:
    facts = replace(CIFAR, copies=10, alike=("/data/a b.jpg", "/data/c.jpg"))
    assert choose(facts).cautions[0] == (
        "10 of 1000 images look like another one of them, such as '/data/a b.jpg' and /data/c.jpg;"
        " of the whole set at least 0.54 % are copies, and far more if most are of different"
        " images, as few are here together: see `dinoscale data deduplicate /data/images`."
    )
    all_copies = "\n".join(choose(replace(CIFAR, copies=900)).cautions)
    assert "of the whole set at least 84 % are copies" in all_copies
    assert least_share_of_copies(replace(CIFAR, images=1000, copies=10)) == 0.01
    unseen = choose(IMAGENET).cautions
    assert "1000 of 1,281,167 images do not show copies" in "\n".join(unseen)
    assert "--images 5000" in unseen[0]


def test_going_on_keeps_what_the_weights_have() -> None:
    shape = BackboneShape("vit_tiny_patch16_224", 32, patch_size=4, depth=2, rope=Rope())
    card = BackboneCard(shape, (0.1,) * 3, (0.2,) * 3, 40, 32, "a run")
    recipe = choose(CIFAR, weights="w", card=card)
    chosen = {setting.key: setting.value for setting in recipe.settings}
    assert recipe.base == "adapt_dinov3_vits16"
    assert (chosen["model.patch_size"], chosen["model.depth"]) == (4, 2)
    assert (chosen["crops.global_size"], chosen["crops.local_size"]) == (64, 28)
    assert chosen["data.mean"] == [0.1] * 3
    with pytest.raises(ConfigError, match="--model s: --from w says which model it is"):
        choose(CIFAR, weights="w", card=card, model="s")
    with pytest.raises(ConfigError, match="a resnet50 has no patches"):
        choose(CIFAR, weights="w", card=replace(card, backbone=BackboneShape("resnet50", 224)))


@pytest.mark.parametrize("preset", ["vit_s16", "dinov2_vits16", "dinov3_vits16"])
def test_runs_whose_patches_are_in_the_name_of_the_model_go_on(tmp_path: Path, preset: str) -> None:
    run = load_config(preset)
    card = card_of(run, source="a run")
    assert card.backbone.patch_size is None
    config = _resolved(tmp_path, IMAGENET, card=card)
    assert config.model.effective_patch_size == run.model.effective_patch_size
    assert config.crops.global_size == 16 * (run.model.effective_patch_size or 0)
    assert config.head.weight_norm != run.model.rotates  # the base is that of its positions


def test_files_that_cannot_be_read_as_the_channels_of_the_weights_keep_theirs(
    tmp_path: Path,
) -> None:
    bands = replace(IMAGENET, channels=13, arrays=200, mean=(0.4,) * 13, std=(0.3,) * 13)
    config = _resolved(tmp_path, bands, card=RGB_CARD)
    assert (config.data.channels, config.data.mean) == (13, (0.4,) * 13)
    assert "see 3 channels and the images have 13" in "\n".join(_on(bands, RGB_CARD).cautions)
    gray = replace(IMAGENET, channels=1, colorless=1.0, mean=(0.4,), std=(0.3,))
    as_rgb, as_stored = _on(gray, RGB_CARD), _on(replace(gray, arrays=200), RGB_CARD)
    assert (_values(as_rgb)["data.channels"], as_rgb.cautions) == (3, choose(gray).cautions)
    assert (_values(as_stored)["data.channels"], len(as_stored.cautions)) == (1, 2)
    bands_card = replace(RGB_CARD, backbone=replace(RGB_CARD.backbone, in_chans=13))
    assert _values(_on(bands, bands_card))["data.color_ops_on"] == "device"
    assert not _on(bands, bands_card).cautions


@pytest.mark.parametrize("workers", [1, 2])
def test_images_that_cannot_be_read_now_are_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    for index in range(200):  # two blocks
        (tmp_path / f"{index:03}.png").write_bytes(png(pixels(index, channels=3)))

    def read(_: Picture) -> None:
        raise UnavailableSampleError("007.png", "stale file handle")

    monkeypatch.setattr(Picture, "pixels", read)
    with pytest.raises(UnavailableError, match=r"007\.png: stale file handle"):
        look_at(str(tmp_path), workers=workers)


def test_color_among_gray_images_is_kept(tmp_path: Path) -> None:
    for index in range(20):
        data = png(pixels(index, channels=1 if index < 11 else 3))
        (tmp_path / f"{index:02}.png").write_bytes(data)
    facts = look_at(str(tmp_path), workers=1)
    assert (facts.channels, facts.colorless, facts.other_channels) == (1, 0.55, 9)
    assert _chosen(facts)["data.channels"] == 3
    assert "11 of 20 images are gray, 9 have color" in "\n".join(choose(facts).cautions)
    gray_card = replace(RGB_CARD, backbone=replace(RGB_CARD.backbone, in_chans=1))
    assert _values(_on(facts, gray_card))["data.channels"] == 3
    bands_card = replace(RGB_CARD, backbone=replace(RGB_CARD.backbone, in_chans=13))
    assert _values(_on(facts, bands_card))["data.channels"] == 3
    few = replace(IMAGENET, channels=1, colorless=0.995)
    assert _chosen(few)["data.channels"] == 1
    assert _chosen(replace(few, arrays=200, channels=3))["data.channels"] == 3
    assert "5 have color, which data.channels=1 drops" in "\n".join(choose(few).cautions)


def test_going_on_with_few_or_small_images_is_short_and_says_what_it_enlarges(
    tmp_path: Path,
) -> None:
    config = _resolved(tmp_path, replace(IMAGENET, images=900), card=RGB_CARD)
    steps = config.train.steps_per_epoch
    assert steps is not None
    epochs = config.train.epochs + phases_of(config)[0].train.epochs
    assert 190 < steps * epochs * config.train.batch_size / 900 <= 200
    assert _values(_on(IMAGENET, RGB_CARD))["train.steps_per_epoch"] == 500
    assert _values(_on(replace(IMAGENET, images=4), RGB_CARD))["train.steps_per_epoch"] == 2
    small = "\n".join(_on(CIFAR, RGB_CARD).cautions)
    assert "crops of 256 px enlarge the images, 32 px in the median, 8 times" in small
    assert "enlarge" not in "\n".join(_on(IMAGENET, RGB_CARD).cautions)


@pytest.mark.parametrize("card", [None, RGB_CARD])
def test_a_recipe_guards_its_features(tmp_path: Path, card: BackboneCard | None) -> None:
    config = _resolved(tmp_path, IMAGENET, card=card)
    assert (config.guard.images, config.guard.on_fall) == (IMAGENET.spec, "warn")
    steps = 100 * 1251 // 50 if card is None else 500
    assert config.guard.every_steps == steps
    assert all(phase.guard == config.guard for phase in phases_of(config))
    few = _resolved(tmp_path, replace(IMAGENET, images=900), card=card)
    assert few.guard.every_steps == (120 if card else 224)  # whole epochs of 40 and 14 steps
    assert "guard.images" not in _chosen(replace(IMAGENET, images=1))


def test_copies_gray_and_damaged_images_are_seen(tmp_path: Path) -> None:
    _noise(tmp_path / "a", images=12)
    for copy, original in (("x", 3), ("y", 5), ("z", 3)):
        with Image.open(tmp_path / "a" / f"{original:03}.png") as image:
            image.convert("RGB").save(tmp_path / "a" / f"{copy}.jpg", quality=80)
    (tmp_path / "a" / "w.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    facts = look_at(str(tmp_path), workers=1)
    assert (facts.images, facts.unreadable, facts.copies) == (16, 1, 3)
    assert [Path(path).name for path in facts.alike] == ["003.png", "x.jpg"]  # z is the third
    assert (facts.channels, facts.short_side, facts.colorless) == (3, (40, 40), 0.0)
    assert look_at(str(tmp_path), workers=2) == facts
    gray = tmp_path / "gray"
    gray.mkdir()
    for index in range(4):
        png_bytes = png(pixels(index, channels=1))
        (gray / f"{index}.png").write_bytes(png_bytes)
    facts = look_at(str(gray), workers=1)
    assert (facts.channels, facts.colorless) == (1, 1.0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "w.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match="none of the 1 images looked at can be read"):
        look_at(str(tmp_path / "b"), workers=1)


def test_deep_images_of_many_channels_get_their_channels_and_white(tmp_path: Path) -> None:
    for index in range(3):
        data = pixels(index, channels=7, dtype="uint16") // 16  # 12 bits
        (tmp_path / f"{index}.npy").write_bytes(npy(data))
        (tmp_path / f"{index}.tif").write_bytes(tiff(data))
    facts = look_at(str(tmp_path), workers=1)
    assert (facts.channels, facts.max_pixel_value, len(facts.mean)) == (7, 4095.0, 7)
    chosen = _chosen(facts)
    assert (chosen["data.channels"], chosen["data.color_ops_on"]) == (7, "device")


@pytest.mark.parametrize(
    ("ranges", "white", "mixed"),
    [
        ([("uint16", 0, 200), ("uint16", 0, 90)], 255.0, ""),
        ([("int16", 0, 200), ("int16", 0, 3000)], 4095.0, ""),
        ([("float32", 0, 0.5), ("float32", 0, 1.02)], 1.0, ""),
        ([("float32", 0, 10)], 10.0, ""),
        ([("float32", 0, 5000), ("float32", 0, 10_000)], 16383.0, ""),
        ([("float64", 0, 1e6)], 1e6, ""),
        ([("int16", -1024, 3000), ("int16", 0, 9)], None, "1 of 2 files hold numbers below 0"),
        ([("float32", 0, 1), ("float32", 0, 90)], None, "1 of 2 files hold numbers up to 1, "),
        ([("float32", 0, 1), ("uint16", 0, 90)], None, "1 of 2 files hold whole numbers"),
        ([("uint8", 0, 255)], None, ""),
    ],
)
def test_white_is_one_number_or_it_is_said_why_not(
    tmp_path: Path, ranges: list[tuple[str, float, float]], white: float | None, mixed: str
) -> None:
    for index, (dtype, low, high) in enumerate(ranges):
        data = np.linspace(low, high, 24 * 24).reshape(24, 24).astype(dtype)
        (tmp_path / f"{index}.npy").write_bytes(npy(data))
    facts = look_at(str(tmp_path), workers=1)
    assert facts.max_pixel_value == white
    assert facts.mixed_scales.startswith(mixed)
    assert bool(facts.mixed_scales) == bool(mixed)
    cautions = "\n".join(choose(facts).cautions)
    assert ("brightness does not compare" in cautions) == bool(mixed)
    assert _chosen(facts).get("data.max_pixel_value") == white


def test_channels_without_contrast_get_a_deviation_that_divides(tmp_path: Path) -> None:
    for index in range(8):
        black = np.zeros((24, 24, 3), np.uint8)
        Image.fromarray(black).save(tmp_path / f"{index}.png")
    facts = look_at(str(tmp_path), workers=1)
    assert facts.std == (0.0,) * 3
    assert "channels [0, 1, 2], counted from 0, are nearly" in "\n".join(choose(facts).cautions)
    assert min(_resolved(tmp_path, facts).data.std) == 0.004
    one_band = replace(IMAGENET, channels=4, arrays=1, mean=(0.4,) * 4, std=(0.3, 0.2, 0.0, 0.3))
    assert _chosen(one_band)["data.std"] == [0.3, 0.2, 0.004, 0.3]


def test_floats_and_deep_pgm_in_pictures(tmp_path: Path) -> None:
    for index in range(2):
        gray = np.linspace(0, 0.5, 24 * 24, dtype=np.float32).reshape(24, 24)
        Image.fromarray(gray).save(tmp_path / f"{index}.tif")
    assert look_at(str(tmp_path), workers=1).max_pixel_value == 1.0
    (tmp_path / "0.pgm").write_bytes(b"P5 2 2 4095 " + bytes(range(8)))
    assert not look_at(str(tmp_path), workers=1).mixed_scales


def test_the_file_loads_and_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _noise(tmp_path / "images", images=8)
    out = tmp_path / "mine.yaml"
    assert not run(["recipe", str(tmp_path / "images"), "--gpus", "4", "--out", str(out)])
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == f"torchrun --nproc-per-node 4 -m dinoscale train {out}"
    config = load_config(str(out))
    assert config.data.train == str(tmp_path / "images")
    assert config.head.num_prototypes == report["settings"]["head.num_prototypes"] == 1024
    assert config.data.mean == tuple(report["settings"]["data.mean"])
    before = out.read_text()
    assert all(len(line) <= 100 for line in before.splitlines() if "#" in line)
    with pytest.raises(ConfigError, match="exists; give another name, or delete it"):
        run(["recipe", str(tmp_path / "images"), "--out", str(out)])
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("gpus", "command"),
    [
        (1, "dinoscale train 'my set.yaml'"),
        (8, "torchrun --nproc-per-node 8 -m dinoscale train 'my set.yaml'"),
        (64, "dinoscale launch 'my set.yaml' --hostfile hostfile"),
    ],
)
def test_the_next_line_is_one_that_reaches_all_gpus(gpus: int, command: str) -> None:
    assert next_command(Path("my set.yaml"), gpus=gpus) == command


def test_only_what_a_training_opens_gets_a_recipe(tmp_path: Path) -> None:
    _noise(tmp_path / "images", images=8)
    inner, outer, out = tmp_path / "a.tar", tmp_path / "outer.tar", tmp_path / "mine.yaml"
    with tarfile.open(inner, "w") as tar:
        for path in sorted((tmp_path / "images").iterdir()):
            tar.add(path, path.name)
    with tarfile.open(outer, "w") as tar:
        tar.add(inner, inner.name)
    (tmp_path / "list").write_text("images/000.png\n")
    (tmp_path / "members.txt").write_text("a.tar::000.png\n")
    for name, why in (
        ("outer.tar", "no images in"),
        ("list", "is not a .tar shard"),
        ("members.txt", "none of the first 1 files"),
    ):
        with pytest.raises(DataError, match=why):
            run(["recipe", str(tmp_path / name), "--out", str(out)])
    with pytest.raises(DataError, match="can only be trained on"):
        run(["recipe", "s3://bucket/{000..007}.tar", "--out", str(out)])
    assert not out.exists()
    for name in ("a.tar", "images", "[ab].tar"):
        assert not run(["recipe", str(tmp_path / name), "--out", str(out)])
        assert resolve(without_auto(load_config(str(out))), world_size=1, num_images=8)
        out.unlink()
