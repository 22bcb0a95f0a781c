"""Images of other than three channels, from files to a run, its k-NN probe and its weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dinoscale.convert.weights_file import load_backbone
from tests.e2e.hostile import dinoscale, refused, settings
from tests.unit.data.conftest import write_tar
from tests.unit.data.many_channels import deep_png, npy, pixels, png, tiff

GRAY = {
    "png": lambda i: png(pixels(i, channels=1)),
    "16.png": lambda i: png(pixels(i, channels=1, dtype="uint16")),
    "tif": lambda i: tiff(pixels(i, channels=1, dtype="uint16")),
    "f.tif": lambda i: tiff(pixels(i, channels=1, dtype="float32")),
}
RGBA = {
    "png": lambda i: png(pixels(i, channels=4)),
    "16.png": lambda i: deep_png(pixels(i, channels=4, dtype="uint16")),
    "tif": lambda i: tiff(pixels(i, channels=4)),
    "npy": lambda i: npy(pixels(i, channels=4, dtype="float32")),
}
SEVEN_TIFF = {
    "tif": lambda i: tiff(pixels(i, channels=7)),
    "16.tif": lambda i: tiff(pixels(i, channels=7, dtype="uint16"), compression="zlib"),
    "pages.tif": lambda i: tiff(
        np.moveaxis(pixels(i, channels=7, dtype="uint16"), -1, 0), planarconfig=None
    ),
}
SEVEN_NPY = {
    "npy": lambda i: npy(pixels(i, channels=7)),
    "16.npy": lambda i: npy(np.moveaxis(pixels(i, channels=7, dtype="int16"), -1, 0)),
}
LAYOUT = {  # kind of files, whether in shards
    "gray folder": (1, GRAY, False),
    "RGBA shards": (4, RGBA, True),
    "seven TIFF shards": (7, SEVEN_TIFF, True),
    "seven NPY folder": (7, SEVEN_NPY, False),
}


def _files(folder: Path, *, kind: dict, shards: bool) -> Path:
    """Sixteen images of two classes."""
    members = {}
    for i in range(16):
        extension, encode = list(kind.items())[i % len(kind)]
        members[f"{i % 2}/{i:02}.{extension}"] = encode(i)
    folder.mkdir()
    if shards:
        labels = {f"{name.split('.')[0]}.cls": name[0].encode() for name in members}
        write_tar(folder / "a.tar", members | labels)
        return folder / "a.tar"
    for name, data in members.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def _channels(count: int) -> dict[str, object]:
    half = "[" + ",".join(["0.5"] * count) + "]"
    return {"data__channels": count, "data__mean": half, "data__std": half}


@pytest.mark.parametrize("name", LAYOUT)
def test_any_number_of_channels_trains_and_comes_back(tmp_path: Path, name: str) -> None:
    channels, kind, shards = LAYOUT[name]
    images = _files(tmp_path / "images", kind=kind, shards=shards)
    probe = {"eval__train": images, "eval__test": images} if channels < 7 else {}
    run = settings(
        data__train=images, data__max_bad_fraction=0.0, run_dir=tmp_path / "run",
        log__every_steps=1, **probe, **_channels(channels),
    )  # fmt: skip
    done = dinoscale("train", "vit_t16", *run)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 2
    assert done.stderr.count("saturation, hue and gray are off") == 1
    if probe:
        assert 0 <= summary["knn_top1"] <= 100, summary
    if channels == 1:
        return
    weights = tmp_path / "weights.safetensors"
    exported = dinoscale("export", tmp_path / "run", weights)
    assert exported.returncode == 0, exported.stderr
    backbone, card = load_backbone(weights)
    assert (card.backbone.in_chans, len(card.mean), len(card.std)) == (channels,) * 3
    assert torch.isfinite(backbone([torch.zeros(1, channels, 16, 16)])).all()
    if channels == 4:
        measured = dinoscale("evaluate", "knn", weights, "--train", images, "--test", images)
        assert measured.returncode == 0, measured.stderr


def test_channels_without_their_mean_are_refused_before_anything_starts(tmp_path: Path) -> None:
    run = settings(data__train=tmp_path, data__channels=4)
    refused(dinoscale("train", "vit_t16", *run), "data.mean", "data.channels", "dataset-stats")
