"""Every command of every README is run: on stand-ins for its images and runs, or it is named here.

Commands follow each other as in their README; what several show, the first one tests. Whatever
launcher a line names, one process runs it: `test_launchers.py` is about launchers.
"""

import importlib
import json
import os
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale.config.sweep.file import load_sweep
from dinoscale.scaling.design.expand import plan_runs
from dinoscale.scaling.sweep.run_files import Job, Result
from dinoscale.scaling.sweep.table import append_row
from dinoscale.scaling.sweep.table_row import row_of
from tests.e2e.hostile import dinoscale, settings
from tests.forked import ROOT, Forked
from tests.readmes import NAMES, arguments_in, blocks_of, commands_of, lines_of
from tests.unit.evaluate.tiny_files import save_picture

pytestmark = pytest.mark.slow

# Starts of lines that no test here runs, and why.
NOT_RUN = {
    "./launchers/quickstart.sh": "installs, then trains for minutes",
    "./launchers/setup.sh": "installs; unit/launch/test_files.py runs it without a network",
    "./launchers/test.sh": "runs these tests",
    "python -m pytest": "runs these tests",
    "tests/matrix.sh": "repeats the golden tests for minutes",
    "tests/gpu/check.sh": "needs a GPU; e2e/test_gpu_check.py runs it without one",
    "python -m tests.faults": "`launchers/test.sh --quick` runs it with fewer kills",
    "python -m tests.benchmarks": "measures for minutes",
    "python -m tests.golden23.mutations": "breaks the step in many ways, for minutes",
    "torchrun --nproc-per-node 8 -m tests.benchmarks": "measures for minutes",
    "sbatch launchers/slurm.sbatch": "needs Slurm; multinode/test_slurm_job.py submits it",
}
_FIRST = "train vit_s16 data.train=data/images run_dir=runs/first"
# What makes a command small; the last of equal options and settings counts.
_SMALL = settings(**{"model.depth": 4})  # blocks, of which a snippet reads all
_FEW = "--num-workers 0"
MORE: dict[str, list[str]] = {
    "train": _SMALL,
    "config": ["train.batch_size=8"],
    "doctor": _SMALL,
    "launch": ["--dry-run"],
    "export": ["--overwrite"],  # a stand-in
    "show crops": ["--images", "2"],
    "bench data": [*_SMALL, "--seconds", "0.05"],
    "bench step": [*_SMALL, "--seconds", "0.05", "--turns", "1", "--no-reference"],
    "recipe": shlex.split(_FEW.replace("0", "1")),
    "evaluate knn": shlex.split(_FEW),
    "evaluate linear": shlex.split(f"{_FEW} --no-augmentation --iterations 2"),
    "evaluate logistic": shlex.split(f"{_FEW} --c 1"),
    "evaluate probe": shlex.split(_FEW),
    "evaluate finetune": shlex.split(f"{_FEW} --epochs 1"),
    "evaluate attention": ["--size", "32"],
    "evaluate segment": ["--size", "32"],
    "evaluate pca": ["--size", "32"],
    "evaluate segmentation": shlex.split(f"{_FEW} --size 32"),
    "evaluate depth": shlex.split(f"{_FEW} --iterations 2 --crop 32 32"),
    "evaluate video": ["--size", "64"],
    "evaluate retrieve": ["--imsize", "64"],
    "evaluate rank": shlex.split(f"{_FEW} --views 2"),
    "evaluate transfer": shlex.split(f"{_FEW} --shots 1 --seeds 1 --c 1"),
    "evaluate discover": ["--size", "32"],
    "evaluate correspond": ["--size", "32"],
    "embed": shlex.split(f"{_FEW} --resize 32 --crop 32"),
    "embed --targets": _SMALL,
    "evaluate copies": ["--size", "32", *shlex.split(_FEW)],
    "data build-shards": ["--workers", "1"],
    "data verify-shards": ["--workers", "1"],
    "data inspect-shards": ["--workers", "1"],
    "data dataset-stats": ["--workers", "1"],
    "data deduplicate": ["--workers", "1"],
    "data synthetic": ["--images", "8", "--workers", "1"],
    "data cluster": shlex.split("--levels 6 2 --iterations 2 --resampling 1"),
    "data balance": ["--images", "16"],
    # Of an untrained network, whose features are all similar.
    "data deduplicate-embeddings": shlex.split("--threshold 0.99999 --against-threshold 0.99999"),
}


def _on_stand_ins(name: str) -> dict[str, None]:
    """The commands of a README in their order, on the stand-ins; equal ones once."""
    own = (command.replace("/data/", "data/") for command in commands_of(name))
    return dict.fromkeys(command.replace("runs/quickstart", "runs/first") for command in own)


def _words(command: str) -> list[str]:
    """The words of a command, with what makes it small."""
    words = shlex.split(command)
    if words[0] == "evaluate" and "--head" in words:  # which has the settings of its training
        return [*words, *shlex.split(_FEW)]
    more = MORE.get(" ".join(words[:2]), MORE.get(words[0], []))
    return [*words, *more]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands read, and the run that the README begins with."""
    place = tmp_path_factory.mktemp("readme")
    for part in ("images", "train", "val", "a", "b"):
        for i in range(16):
            save_picture(place / "data" / part / "xy"[i % 2] / f"{part}{i}.jpg", seed=i)
    for i in range(3):
        save_picture(place / "photos" / f"{i}.jpg", seed=i)
    save_picture(place / "cat.jpg", seed=0)
    _add_shards(place)
    _add_labelled_sets(place)
    (place / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "launchers" / "hostfile.example", place / "hostfile")
    _run(_FIRST, place)
    _run("export runs/first weights.safetensors", place)
    shutil.copy(place / "weights.safetensors", place / "a.safetensors")
    _add_sweep(place)
    return place


def _add_shards(place: Path) -> None:
    """ImageNet's tar of tars, one for each class."""
    with tarfile.open(place / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in "xy":
            inner = place / f"n0000000{ord(name) % 2}.tar"
            with tarfile.open(inner, "w") as tar:
                for picture in sorted((place / "data" / "train" / name).iterdir()):
                    tar.add(picture, picture.name)
            outer.add(inner, inner.name)
            inner.unlink()


def _add_labelled_sets(place: Path) -> None:
    """Sets of VOC, DAVIS, Oxford's buildings and Copydays, as they are downloaded."""
    voc, davis, copydays = place / "VOC2012", place / "DAVIS", place / "copydays"
    for i in range(2):
        save_picture(voc / "JPEGImages" / f"{i}.jpg", seed=i)
        _save_mask(voc / "SegmentationObject" / f"{i}.png")
        _save_mask(voc / "SegmentationClass" / f"{i}.png")
        _save_depths(place / "nyu", seed=i)
    for part in ("train", "val"):
        lists = voc / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{part}.txt").write_text(f"{int(part == 'val')}\n")
    for i in range(3):
        save_picture(davis / "JPEGImages" / "480p" / "bear" / f"{i:05d}.jpg", seed=i)
        _save_mask(davis / "Annotations" / "480p" / "bear" / f"{i:05d}.png")
    for i in range(4):
        save_picture(place / "roxford5k" / "jpg" / f"image{i}.jpg", seed=i % 2)
        save_picture(copydays / "original" / f"{2000 + i}00.jpg", seed=i)
        save_picture(copydays / "queries" / f"{2000 + i}01.jpg", seed=i)
    for name in "ab":
        save_picture(place / "SPair-71k" / "JPEGImages" / "cat" / f"{name}.jpg", seed=ord(name))
    pair = {
        **{"category": "cat", "src_imname": "a.jpg", "trg_imname": "b.jpg"},
        **{"src_kps": [[10, 20]], "trg_kps": [[14, 25]], "trg_bndbox": [0, 0, 40, 48]},
    }
    annotation = place / "SPair-71k" / "PairAnnotation" / "test" / "1-a-b:cat.json"
    annotation.parent.mkdir(parents=True)
    annotation.write_text(json.dumps(pair))
    truth = {
        "imlist": [f"image{i}" for i in range(4)],
        "qimlist": ["image0"],
        "gnd": [{"easy": [2], "hard": [3], "junk": [0], "bbx": [1, 2, 30, 40]}],
    }
    (place / "gnd_roxford5k.json").write_text(json.dumps(truth))
    several = {f"val{i}.jpg": ["xy"[i % 2], *("x" * (i == 1))] for i in range(16)}
    (place / "real.json").write_text(json.dumps(several))


def _save_mask(path: Path) -> None:
    """One object in a picture of `save_picture`, as a palette's number."""
    inside = np.zeros((48, 40), dtype=np.uint8)
    inside[10:30, 8:30] = 1
    mask = Image.fromarray(inside, "P")
    mask.putpalette([0, 0, 0, 128, 0, 0])
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)


def _save_depths(root: Path, *, seed: int) -> None:
    """A picture for training and one for a test, with the same depth."""
    depth = Image.fromarray(np.linspace(500, 9000, 48 * 40).reshape(48, 40).astype(np.uint16))
    for part in ("train", "test"):
        save_picture(root / part / f"{seed}.jpg", seed=seed)
        (root / f"{part}-depth").mkdir(exist_ok=True)
        depth.save(root / f"{part}-depth" / f"{seed}.png")


def _add_sweep(place: Path) -> None:
    """The table of a finished laptop sweep, and a copy."""
    sweep = load_sweep(ROOT / "configs" / "sweep" / "laptop.yaml")
    table = place / sweep.out / "results.csv"
    table.parent.mkdir(parents=True)
    for run in plan_runs(sweep):
        result = Result(run.key, ending="done", trained=True, seconds=60.0)
        wrong = 0.1 + 10 / run.parameters**0.4 + 20 / run.images**0.5
        append_row(table, row_of(run, Job(run.key), result, metrics={"knn": wrong}))
    shutil.copy(table, place / "results.csv")


def _run(command: str, place: Path) -> str:
    """Run a command to its end; what it printed to stdout."""
    words = _words(command)
    done = dinoscale(*words, cwd=place, OMP_NUM_THREADS="1")
    assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    for option, value in pairwise(words):
        assert option != "--out" or (place / value).exists(), command
    return done.stdout


@pytest.fixture
def place(stand_ins: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the stand-ins, which a README may change."""
    yield Path(shutil.copytree(stand_ins, tmp_path / "place", symlinks=True))
    shutil.rmtree(tmp_path / "place")


@pytest.mark.parametrize("name", [name for name in NAMES if commands_of(name)])
def test_commands_of_a_readme_run_one_after_another(name: str, place: Path) -> None:
    before = {command for other in NAMES[: NAMES.index(name)] for command in _on_stand_ins(other)}
    for number, command in enumerate(_on_stand_ins(name)):
        if command not in before:
            named = "run_dir=" in command or command == "train mine.yaml"  # by `recipe`
            unnamed = command.startswith("train") and not named
            _run(f"{command} run_dir=runs/{number}" if unnamed else command, place)
    for block in blocks_of(name, "python"):
        _execute_apart(block, place)


def _execute_apart(code: str, place: Path) -> None:
    process = Forked(_execute, code, cwd=place, environment={**os.environ, "OMP_NUM_THREADS": "1"})
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, f"{code}\n{said[-3000:]}"


def _execute(code: str) -> None:
    """Run a snippet with what it does not say itself: the libraries, and pictures."""
    libraries = [n for n in ("onnxruntime", "timm", "torch", "transformers") if f"{n}." in code]
    names: dict[str, Any] = {name: importlib.import_module(name) for name in libraries}
    array = np.zeros((1, 3, 16, 16), dtype=np.float32)
    exec(code, {**names, "array": array, "images": torch.from_numpy(array)})


def test_every_line_is_run_or_named_here_with_the_reason() -> None:
    others = [line for name in NAMES for line in lines_of(name) if arguments_in(line) is None]
    assert not [line for line in others if not line.startswith(tuple(NOT_RUN))]
    assert not [start for start in NOT_RUN if not any(line.startswith(start) for line in others)]
    used = {
        " ".join(shlex.split(c)[:n]) for name in NAMES for c in commands_of(name) for n in (1, 2)
    }
    assert not MORE.keys() - used
