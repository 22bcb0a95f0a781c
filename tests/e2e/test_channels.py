"""Images of other than three channels, from files to a run, its k-NN probe and its weights."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dinoscale.convert.weights_file import load_backbone
from tests.e2e.hostile import ROOT, dinoscale, refused, settings
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


# One process for all runs: starting one takes longer than a run.
_SEVERAL = """
import json, logging, os, sys
from dinoscale import cli
from dinoscale.runtime import distributed
from dinoscale.config import load_config
from dinoscale.runtime.launcher_env import read_process
from dinoscale.training.trainer import train
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
process = read_process(os.environ)
distributed.start(process)
for name, *arguments in json.loads(sys.argv[1]):
    if name == "train":
        print(json.dumps(train(load_config(arguments[0], arguments[1:]), process)), flush=True)
    else:
        cli.run([name, *arguments])
distributed.stop()
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict], str, Path]:
    """What each run said at its end, all that was logged, and the folder of the weights."""
    folder = tmp_path_factory.mktemp("channels")
    commands: dict[str, list[str]] = {}
    for name, (channels, kind, shards) in LAYOUT.items():
        images = _files(folder / name, kind=kind, shards=shards)
        probe = {"eval__train": images, "eval__test": images} if channels < 7 else {}
        run, weights = str(folder / f"{name} run"), str(folder / f"{name}.safetensors")
        commands[name] = ["train", "vit_t16", *settings(
            data__train=images, data__max_bad_fraction=0.0, run_dir=run, **probe,
            **_channels(channels),
        )]  # fmt: skip
        commands[f"{name} export"] = ["export", run, weights]
    gray, four = str(folder / "gray folder"), str(folder / "RGBA shards" / "a.tar")
    commands["knn of 4"] = [
        "evaluate", "knn", str(folder / "RGBA shards.safetensors"), "--train", four,
        "--test", four, "--num-workers", "0", "--pixels",
    ]  # fmt: skip
    commands["attention of 1"] = [
        "evaluate", "attention", str(folder / "gray folder.safetensors"), gray,
        str(folder / "attention.png"),
    ]  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", _SEVERAL, json.dumps(list(commands.values()))],
        capture_output=True, text=True, timeout=200, cwd=ROOT,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    answers, text = [], process.stdout.strip()
    while text:
        answer, end = json.JSONDecoder().raw_decode(text)
        answers.append(answer)
        text = text[end:].strip()
    return dict(zip(commands, answers, strict=True)), process.stderr, folder


@pytest.mark.parametrize("name", LAYOUT)
def test_any_number_of_channels_trains_and_its_weights_load(
    done: tuple[dict[str, dict], str, Path], name: str
) -> None:
    answers, _, folder = done
    assert answers[name]["steps"] == 2
    backbone, card = load_backbone(folder / f"{name}.safetensors")
    channels = LAYOUT[name][0]
    assert (card.backbone.in_chans, len(card.mean), len(card.std)) == (channels,) * 3
    assert torch.isfinite(backbone([torch.zeros(1, channels, 16, 16)])).all()


def test_probe_and_evaluation_see_as_many_channels(
    done: tuple[dict[str, dict], str, Path],
) -> None:
    answers, _, folder = done
    for name in ("gray folder", "RGBA shards"):
        assert 0 <= answers[name]["knn_top1"] <= 100
    found = answers["knn of 4"]
    assert found["train"]["images"] == found["test"]["images"] == 16
    assert found["knn"]["10"]["top1"] >= 0
    assert found["pixels"]["knn"]["10"]["top1"] >= 0
    assert (folder / "attention.png").exists()


def test_a_run_says_once_which_changes_are_off(done: tuple[dict[str, dict], str, Path]) -> None:
    assert done[1].count("saturation, hue and gray are off") == len(LAYOUT)


def test_the_command_trains_on_folders_of_arrays(tmp_path: Path) -> None:
    images = _files(tmp_path / "images", kind=SEVEN_NPY, shards=False)
    run = settings(data__train=images, run_dir=tmp_path / "run", **_channels(7))
    done = dinoscale("train", "vit_t16", *run)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2


def test_channels_without_their_mean_are_refused_before_anything_starts(tmp_path: Path) -> None:
    run = settings(data__train=tmp_path, data__channels=4)
    refused(dinoscale("train", "vit_t16", *run), "data.mean", "data.channels", "dataset-stats")
