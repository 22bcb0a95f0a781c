import io
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.build_shards import build_shards
from data_tools.deduplicate import ByFeatures, ByHash, Near, deduplicate
from data_tools.near_duplicates import close_pairs, num_pieces, perceptual_hash
from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.data.sources.source import open_source
from dinoscale.errors import DataError
from dinoscale.models.zoo import build_backbone
from tests.unit.data.conftest import jpeg, picture
from tests.unit.data_tools.conftest import Storage


def _saved(image: Image.Image, kind: str = "JPEG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """40 different pictures, and copies of three of them: exact, re-encoded, made smaller."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.jpg").write_bytes(jpeg(i, width=96, height=72))
    one, two = (picture(i, width=96, height=72) for i in (1, 2))
    (folder / "z00-exact.jpg").write_bytes(jpeg(0, width=96, height=72))
    (folder / "z01-worse.jpg").write_bytes(_saved(one, quality=30))
    (folder / "z02-small.png").write_bytes(_saved(two.resize((60, 45)), "PNG"))
    (folder / "z03-white.png").write_bytes(_saved(Image.new("RGB", (50, 50), "white"), "PNG"))
    (folder / "z04-black.png").write_bytes(_saved(Image.new("RGB", (50, 50), "black"), "PNG"))
    (folder / "z05-torn.jpg").write_bytes(jpeg(5)[:100])
    return folder


def _groups(path: Path) -> list[list[str]]:
    groups = []
    for line in path.read_text().splitlines():
        group = json.loads(line)
        names = [group["keep"], *(entry["path"] for entry in group["duplicates"])]
        groups.append([Path(name.split("::")[-1]).name for name in names])
    return groups


def test_copies_are_found_where_planted_and_nowhere_else(planted: Path, tmp_path: Path) -> None:
    out, keep = tmp_path / "groups.jsonl", tmp_path / "keep.txt"
    found = deduplicate(str(planted), ByHash(4), out=out, keep_list=keep, workers=2)
    assert _groups(out) == [
        ["00.jpg", "z00-exact.jpg"],
        ["01.jpg", "z01-worse.jpg"],
        ["02.jpg", "z02-small.png"],
    ]
    assert (found["groups"], found["duplicates"], found["of_the_same_bytes"]) == (3, 3, 1)
    assert (found["unreadable"], found["without_hash"], found["kept"]) == (1, 2, 42)
    kept = {Path(line).name for line in keep.read_text().splitlines()}
    gone = {"z00-exact.jpg", "z01-worse.jpg", "z02-small.png", "z05-torn.jpg"}
    assert kept == {path.name for path in planted.iterdir()} - gone


def _frame(at: int) -> Image.Image:
    """Of a video in which one scene passes slowly into another."""
    return Image.blend(picture(1, width=96, height=72), picture(2, width=96, height=72), at / 39)


def test_every_picture_left_out_is_like_one_that_is_kept(tmp_path: Path) -> None:
    """Neighbours of a video are alike, its first and last frames are not."""
    folder, out = tmp_path / "video", tmp_path / "groups.jsonl"
    folder.mkdir()
    for at in range(40):
        (folder / f"{at:02}.png").write_bytes(_saved(_frame(at), "PNG"))
    found = deduplicate(str(folder), ByHash(4), out=out, keep_list=None, workers=1)
    assert found["groups"] > 1
    hashes = {f"{at:02}.png": perceptual_hash(np.asarray(_frame(at))) for at in range(40)}
    groups = _groups(out)
    for keep, *others in groups:
        assert all((hashes[keep] ^ hashes[other]).bit_count() <= 4 for other in others)
    assert sum(len(group) for group in groups) <= 40
    assert found["kept"] == 40 - found["duplicates"]


def test_copies_in_two_classes_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = tmp_path / "images", tmp_path / "groups.jsonl"
    for name, seed in {"cat/a": 0, "cat/b": 1, "dog/a": 0, "dog/c": 2, "dog/d": 2}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jpg").write_bytes(jpeg(seed))
    keep = tmp_path / "keep.txt"
    found = deduplicate(str(folder), None, out=out, keep_list=keep, workers=1)
    assert (found["duplicates"], found["of_another_class"]) == (2, 1)
    first = json.loads(out.read_text().splitlines()[0])
    assert (first["class"], first["duplicates"][0]["class"]) == ("cat", "dog")
    assert "1 copies are in another class" in caplog.text


def test_list_of_one_class_keeps_its_number(tmp_path: Path) -> None:
    folder, keep = tmp_path / "images", tmp_path / "keep.txt"
    for name, seed in {"ant/a": 0, "bee/b": 0, "bee/c": 1}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = picture(seed, width=96, height=72)
        (folder / f"{name}.jpg").write_bytes(_saved(image, quality=95 if "b" in name else 30))
    deduplicate(str(folder), ByHash(4), out=None, keep_list=keep, workers=1)
    out = tmp_path / "out"
    build_shards(str(keep), out, shard_bytes=9999, max_side=None, seed=0, prefix="t", workers=1)
    assert set(open_source(str(out)).labels.tolist()) == {1}
    assert (out / "classes.txt").read_text() == "0\tant\n1\tbee\n"


def test_pictures_that_cannot_be_read_stay_in_the_list(tmp_path: Path, storage: Storage) -> None:
    folder, keep = tmp_path / "images", tmp_path / "keep.txt"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03}.jpg").write_bytes(jpeg(i) if i != 7 else b"no picture")
    storage.fails = {"042.jpg": math.inf}
    found = deduplicate(str(folder), ByHash(0), out=None, keep_list=keep, workers=1)
    assert (found["unreadable"], found["unavailable"], found["kept"]) == (2, 1, 99)
    kept = {Path(line).name for line in keep.read_text().splitlines()}
    assert kept == {f"{i:03}.jpg" for i in range(100) if i != 7}


def test_exact_copies_alone(planted: Path, tmp_path: Path) -> None:
    out = tmp_path / "groups.jsonl"
    found = deduplicate(str(planted), None, out=out, keep_list=None, workers=1)
    assert _groups(out) == [["00.jpg", "z00-exact.jpg"]]
    assert json.loads(out.read_text())["duplicates"][0]["same_bytes"] is True
    assert found["kept"] == 45


def test_kept_pictures_of_shards_become_shards(planted: Path, tmp_path: Path) -> None:
    def build(spec: Path, out: Path) -> None:
        build_shards(
            str(spec), out, shard_bytes=20000, max_side=None, seed=0, prefix="t", workers=1
        )

    build(planted, tmp_path / "all")
    keep = tmp_path / "keep.txt"
    shards = str(tmp_path / "all")
    found = deduplicate(shards, ByHash(4), out=None, keep_list=keep, workers=1)
    assert (found["groups"], found["duplicates"]) == (3, 3)
    build(keep, tmp_path / "kept")
    assert len(open_source(str(tmp_path / "kept"))) == found["kept"] == 42


@pytest.mark.parametrize("radius", [0, 1, 4, 8])
def test_pairs_by_bands_are_all_pairs_within_the_radius(radius: int) -> None:
    rng = np.random.default_rng(radius)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    for i in range(150):  # half of them are others with up to ten bits turned
        bits = rng.choice(64, i % 11, replace=False).astype(np.uint64)
        flips = np.bitwise_or.reduce(np.uint64(1) << bits) if len(bits) else np.uint64(0)
        hashes[150 + i] = hashes[i % 40] ^ flips
    found = {tuple(pair) for pairs in close_pairs(hashes, radius=radius) for pair in pairs.tolist()}
    near = {
        (i, j)
        for i, j in combinations(range(300), 2)
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= radius
    }
    assert found <= near
    _, first = np.unique(hashes, return_index=True)
    firsts = set(first.tolist())  # one stands for all equal ones
    assert {(i, j) for i, j in near if i in firsts and j in firsts} <= found
    for i in set(range(300)) - firsts:
        assert any(i in pair and hashes[pair[0]] == hashes[pair[1]] for pair in found)


@pytest.mark.parametrize("number", [1, 2, 1000, 10**6, 10**9])
@pytest.mark.parametrize("radius", [1, 4, 8])
def test_sorted_pieces_tell_the_hashes_apart(number: int, radius: int) -> None:
    """Else groups of equal pieces, in which all pairs are compared, would grow with the set."""
    pieces = num_pieces(number, radius=radius)
    assert 2 ** (64 // (radius + pieces) * pieces) >= number


def test_hash_of_photographs_survives_saving_at_half_the_size(image_sets: Path) -> None:
    photographs = open_source(str(image_sets / "imagenette224" / "val-000.tar"))
    hashes, distances = [], []
    for i in range(0, 500, 5):
        image = Image.fromarray(photographs.picture(i).pixels())
        worse = Image.open(io.BytesIO(_saved(image.resize((112, 112)), quality=50)))
        first, second = (perceptual_hash(np.asarray(x.convert("RGB"))) for x in (image, worse))
        if first is not None:
            distances.append((first ^ second).bit_count())
            hashes.append(first)
    assert len(hashes) > 90
    assert max(distances) <= 6
    assert min((one ^ other).bit_count() for one, other in combinations(hashes, 2)) > 8


def test_plain_picture_has_no_hash() -> None:
    assert perceptual_hash(np.full((50, 50, 3), 200, np.uint8)) is None


@pytest.mark.parametrize(
    "near", [ByHash(9), ByHash(-1), ByFeatures("x", 0.0, None), ByFeatures("x", 1.1, None)]
)
def test_settings_out_of_range_are_refused(planted: Path, near: Near) -> None:
    with pytest.raises(DataError, match=r"--radius|--threshold"):
        deduplicate(str(planted), near, out=None, keep_list=None, workers=1)


def test_features_find_pictures_that_are_similar_to_a_backbone(
    planted: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 2}
    shape = BackboneShape("vit_tiny_patch16_224", img_size=32, **sizes)
    card = BackboneCard(
        shape, mean=(0.5,) * 3, std=(0.2,) * 3, resize=32, crop=32, source="untrained"
    )
    weights = tmp_path / "w.safetensors"
    backbone = build_backbone("vit_tiny_patch16_224", img_size=32, **sizes)
    save_backbone(weights, backbone.state_dict(), card)
    (planted / "z03-white.png").unlink()
    (planted / "z04-black.png").unlink()
    out = tmp_path / "groups.jsonl"
    near = ByFeatures(str(weights), 0.999, None)
    found = deduplicate(str(planted), near, out=out, keep_list=None, workers=1)
    assert _groups(out) == [
        ["00.jpg", "z00-exact.jpg"],
        ["01.jpg", "z01-worse.jpg"],
        ["02.jpg", "z02-small.png"],
    ]
    assert found["duplicates"] == 3
