"""`dinoscale embed`: what a reader with numpy alone finds, and what a second call does."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

import dinoscale
from dinoscale.convert.weights_file import save_backbone
from dinoscale.errors import ConfigError, DataError, DinoscaleError, OutputError
from dinoscale.evaluate.classification.knn import TEMP, evaluate_knn
from dinoscale.evaluate.embedding.embed import EmbedOptions, embed
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from tests.forked import Forked
from tests.unit.evaluate.tiny_files import CARD, save_picture, save_weights

ALL = ("cls", "mean_patch", "patches")
SMALL = EmbedOptions(batch_size=3, num_workers=0, shard_size=6, features=ALL, progress=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen pictures of two classes, and one that cannot be read."""
    place = tmp_path_factory.mktemp("images")
    for i in range(13):
        save_picture(place / "xy"[i % 2] / f"{i:02d}.png", seed=i, size=(40 + i, 48))
    (place / "x" / "05.png").write_bytes(b"not a picture")
    return place


def _manifest(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_bytes())
    return manifest


def _read(out: Path, feature: str) -> NDArray[Any]:
    shards = _manifest(out)["shards"]
    return np.concatenate([np.load(out / shard["arrays"][feature]["file"]) for shard in shards])


def _all(out: Path, key: str) -> list[Any]:
    return [value for shard in _manifest(out)["shards"] for value in shard[key]]


def _bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def written(weights: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "out"
    embed(weights, str(images), out, SMALL)
    return out


def test_a_folder_named_relative_is_written_down_absolute_and_found_from_elsewhere(
    weights: Path, images: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _manifest(written)["data"]["root"] == str(images)
    monkeypatch.chdir(images.parent)
    embed(weights, images.name, tmp_path / "out", SMALL)
    assert _manifest(tmp_path / "out")["data"] == {
        **_manifest(written)["data"],
        "spec": images.name,
    }
    kept = _bytes(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    embed(weights, str(images), tmp_path / "out", SMALL)
    assert _bytes(tmp_path / "out") == kept


def test_numpy_reads_what_load_backbone_computes(
    weights: Path, images: Path, written: Path
) -> None:
    model, transform = dinoscale.load_backbone(weights)
    names, arrays = _all(written, "images"), {name: _read(written, name) for name in ALL}
    assert len(names) == 13
    for row, name in enumerate(names):
        image = Image.open(images / name)
        tokens = model.forward_features(transform(image)[None])
        expected = {
            "cls": tokens.cls,
            "mean_patch": tokens.patches.mean(1),
            "patches": tokens.patches,
        }
        for feature, values in expected.items():
            np.testing.assert_allclose(arrays[feature][row], values[0], rtol=1e-4, atol=1e-5)
        assert _all(written, "sizes")[row] == [image.height, image.width]
        assert _manifest(written)["classes"][_all(written, "labels")[row]] == name[0]
    assert names == sorted(names)


def test_the_manifest_says_what_was_written_from_what(weights: Path, written: Path) -> None:
    manifest = _manifest(written)
    assert manifest["features"]["patches"] == {"dtype": "float32", "shape": [13, 16, 64]}
    for feature in ALL:
        assert [*_read(written, feature).shape] == manifest["features"][feature]["shape"]
    assert manifest["settings"]["preprocessing"]["crop"] == 32
    assert manifest["weights"]["file_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    (lost,) = manifest["unreadable"]
    assert (lost["name"], lost["number"]) == ("x/05.png", 3)
    arrays = [array for shard in manifest["shards"] for array in shard["arrays"].values()]
    for array in arrays:
        data = (written / array["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (array["bytes"], array["sha256"])
    names = {array["file"] for array in arrays} | {"manifest.json"}
    assert {path.name for path in written.iterdir()} == names


def test_k_nn_of_the_arrays_is_that_of_evaluate_knn(weights: Path, tmp_path: Path) -> None:
    sets = [f"synthetic:shapes?images=60&size=32&split={split}" for split in ("train", "test")]
    options = EmbedOptions(batch_size=8, num_workers=0, shard_size=16, progress=False)
    for spec, name in zip(sets, ("train", "test"), strict=True):
        embed(weights, spec, tmp_path / name, options)
    bank, queries = (_read(tmp_path / name, "cls").astype(np.float64) for name in ("train", "test"))
    labels, expected = (np.array(_all(tmp_path / name, "labels")) for name in ("train", "test"))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    cosines, k = queries @ bank.T, 10
    correct = 0
    for row, label in zip(cosines, expected, strict=True):
        nearest = np.argsort(-row)[:k]
        votes = np.bincount(labels[nearest], weights=np.exp(row[nearest] / TEMP))
        correct += votes.argmax() == label
    measured = evaluate_knn(
        *(weights, *sets),
        ks=[k],
        options=ExtractionOptions(batch_size=8, num_workers=0, cache=False, progress=False),
    )
    assert 0 < correct < 60
    assert measured["score"] == {"top1_k10": pytest.approx(100 * correct / 60)}


def _embed(*arguments: Any) -> None:
    torch.set_num_threads(1)
    embed(*arguments)


def test_a_killed_call_goes_on_and_ends_as_the_whole_one(weights: Path, tmp_path: Path) -> None:
    many = replace(SMALL, shard_size=3, features=("cls",))
    spec, out = "synthetic:shapes?images=60&size=32", tmp_path / "killed"
    process = Forked(_embed, weights, spec, out, many)
    while not (out / "shard-00001.json").exists():
        assert process.poll() is None, process.communicate(timeout=60)
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    finished = {path.name for path in out.glob("shard-*.json")}
    times = {path: path.stat().st_mtime_ns for path in out.glob("*-00001.npy")}
    (out / "cls-00000.npy").write_bytes(b"cut off")
    embed(weights, spec, tmp_path / "whole", many)
    rest = embed(weights, spec, out, many)
    assert rest["new_shards"] == 20 - len(finished) + 1 > 1
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert _bytes(out) == _bytes(tmp_path / "whole")
    assert embed(weights, spec, out, many)["new_shards"] == 0
    (out / "cls-00002.npy").unlink()
    with pytest.raises(OutputError, match=r"cls-00002\.npy is missing or has another size"):
        embed(weights, spec, out, many)


def test_a_folder_of_other_features_is_refused(
    weights: Path, images: Path, written: Path, tmp_path: Path
) -> None:
    before = _bytes(written)
    for options, says in (
        (replace(SMALL, crop=24), "preprocessing.crop is 32 there and 24 now"),
        (replace(SMALL, features=("cls",)), 'features is \\["cls", "mean_patch", "patches"\\]'),
        (replace(SMALL, precision="bf16"), 'precision is "fp32" there and "bf16" now'),
    ):
        with pytest.raises(OutputError, match=says):
            embed(weights, str(images), written, options)
    with pytest.raises(OutputError, match=r"data.images is 14 there and 9 now"):
        embed(weights, "synthetic:shapes?images=9&size=32", written, SMALL)
    other = load_file(weights)
    other["norm.bias"] += 1
    save_backbone(tmp_path / "other.safetensors", other, CARD)
    with pytest.raises(OutputError, match=r"weights\.tensors_sha256 is .* there and"):
        embed(tmp_path / "other.safetensors", str(images), written, SMALL)
    same = load_file(weights)
    shape = replace(CARD.backbone, norm_eps=0.01)
    save_backbone(tmp_path / "eps.safetensors", same, replace(CARD, backbone=shape))
    with pytest.raises(OutputError, match=r"backbone\.norm_eps is null there and 0\.01 now"):
        embed(tmp_path / "eps.safetensors", str(images), written, SMALL)
    torch.save(same, tmp_path / "without_heads.pth")
    with pytest.raises(OutputError, match=r"backbone\.num_heads is 2 there and 1 now"):
        embed(tmp_path / "without_heads.pth", str(images), written, SMALL)
    assert _bytes(written) == before


def test_what_cannot_work_is_refused_before_anything_is_written(
    weights: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    cases: list[tuple[str, object, Path, EmbedOptions, type[DinoscaleError], str]] = [
        (
            "patches",
            images,
            tmp_path / "a",
            replace(SMALL, resize=40, crop=36),
            ConfigError,
            "choose 32 or 40",
        ),
        (
            "name",
            images,
            tmp_path / "a",
            replace(SMALL, features=("tokens",)),
            ConfigError,
            "no 'tokens'",
        ),
        ("inside", images, images / "features", SMALL, OutputError, "inside the images"),
        ("other", images, tmp_path / "other", SMALL, OutputError, "holds other files .notes.txt."),
        ("secret", "https://me:word@host/a.tar", tmp_path / "a", SMALL, ConfigError, "password"),
    ]
    for _, spec, out, options, kind, says in cases:
        with pytest.raises(kind, match=says):
            embed(weights, str(spec), out, options)
    assert not (tmp_path / "a").exists()
    assert not (images / "features").exists()


def test_a_set_without_a_readable_image_has_no_manifest(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"none of the 1 images can be read; the first: a\.jpg"):
        embed(weights, str(tmp_path / "bad"), tmp_path / "out", SMALL)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_float16_and_bf16_and_another_size(weights: Path, images: Path, tmp_path: Path) -> None:
    half = replace(SMALL, dtype="float16", features=("patches",))
    embed(weights, str(images), tmp_path / "half", half)
    embed(weights, str(images), tmp_path / "full", replace(SMALL, features=("patches",)))
    embed(weights, str(images), tmp_path / "bf16", replace(half, precision="bf16"))
    halves, full = _read(tmp_path / "half", "patches"), _read(tmp_path / "full", "patches")
    assert halves.dtype == np.float16
    np.testing.assert_array_equal(halves, full.astype(np.float16))
    rough = _read(tmp_path / "bf16", "patches").astype(np.float32)
    assert 0 < abs(rough - full).max() < 0.05 * abs(full).max()  # bfloat16 has 8 bits
    large = torch.from_numpy(rough[abs(rough) > 1e-3])  # float16 keeps these as they are
    assert torch.equal(large.bfloat16().float(), large)
    larger = replace(SMALL, resize=64, crop=48, features=())
    summary = embed(weights, str(images), tmp_path / "larger", larger)
    assert [*summary["features"]] == ["cls", "mean_patch"]  # type: ignore[call-overload]  # a dict


def test_streamed_shards_have_the_features_of_their_folder(
    weights: Path, images: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOSCALE_ALLOW_PIPE", "1")
    names = [name for name in sorted(images.glob("*/*")) if name != images / "x" / "05.png"]
    counts = []
    for number, some in enumerate((names[:5], names[5:])):
        with tarfile.open(tmp_path / f"set-{number}.tar", "w") as tar:
            for path in some:
                tar.add(path, f"{path.parent.name}{path.name}")
        counts.append({"name": f"set-{number}.tar", "samples": len(some)})
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"format": 1, "shards": counts}))
    spec = f"pipe:echo >> {tmp_path}/opened; cat {tmp_path}/set-{{0,1}}.tar"
    options = replace(SMALL, features=("cls",), num_workers=2, manifest=str(manifest))
    embed(weights, spec, tmp_path / "out", options)
    np.testing.assert_allclose(
        _read(tmp_path / "out", "cls"), _read(written, "cls"), rtol=1e-4, atol=1e-6
    )
    assert _all(tmp_path / "out", "images")[0].endswith("set-0.tar::0 (x00.png)")
    assert (tmp_path / "opened").read_text() == "\n" * 2  # each shard once, whatever the workers
