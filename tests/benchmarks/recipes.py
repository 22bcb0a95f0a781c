"""Presets that `dinoscale recipe` writes for real sets, trained for a hundred steps each.

    python -m tests.benchmarks.recipes --data FOLDER

FOLDER holds `cifar10/`, `imagenette224/`, `ecssd-masks/`, `davis-video/` and `odd-images/` as tar
shards and files.
Each set gets a preset from scratch; what that has trained is the weights from which the second
preset goes on, in its two phases. Only what makes a run small is changed: width and depth of the
network and of the heads, the images of a step, and from scratch the steps that are taken, going on
those of an epoch. Crops, patches, prototypes, losses and schedules stay as written. One line of
JSON a preset; exit code 1 if one of them failed.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from dinoscale.planning.bench.budget import say

STEPS = 100
SMALL = {
    "model.embed_dim": 64,
    "model.depth": 2,
    "model.num_heads": 1,
    "head.hidden_dim": 128,
    "head.bottleneck_dim": 32,
    "train.batch_size": 4,
    "train.micro_batch_size": 4,
    "optim.min_lr": 1e-6,  # below the peak rate of 4 images
    "engine.precision": "fp32",
    "data.num_workers": 1,
    "log.every_steps": 1,
    "log.wandb": "false",
}
FROM_SCRATCH = {"train.stop_after_steps": STEPS}
# Phases of 20 and 50 epochs, all of whose schedules are passed through.
GOING_ON = {
    "patch_head.hidden_dim": 128,
    "patch_head.bottleneck_dim": 32,
    "train.steps_per_epoch": 2,
}


class Set(NamedTuple):
    """Images to train on, as `recipe` takes them."""

    name: str
    spec: str


def sets_in(folder: Path, scratch: Path) -> list[Set]:
    """The sets; compressed shards are unpacked to `scratch`."""
    for packed in sorted((folder / "cifar10").glob("train-*.tar.gz")):
        with gzip.open(packed) as source, (scratch / packed.stem).open("wb") as target:
            shutil.copyfileobj(source, target)
    return [
        Set("CIFAR-10", f"{scratch}/train-{{000..007}}.tar"),
        Set("Imagenette, 224 pixels", f"{folder}/imagenette224/train-{{000..007}}.tar"),
        Set("ECSSD, 120 photographs", f"{folder}/ecssd-masks/all-000.tar"),
        Set(
            "DAVIS, 80 frames of two videos",
            f"{folder}/davis-video/{{car-shadow,motocross-jump}}.tar",
        ),
        Set("odd images that load", f"{folder}/odd-images/loads"),
    ]


def run(*arguments: object) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command of dinoscale, and its seconds."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "dinoscale", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done, time.perf_counter() - begin


def trained(
    images: Set, scratch: Path, settings: dict[str, object], *, weights: Path | None = None
) -> tuple[dict[str, Any], Path]:
    """Write a preset for a set and train with it; what happened, and the run."""
    name = f"{images.name.split()[0].strip(',')}_{'scratch' if weights is None else 'on'}"
    preset, run_dir = scratch / f"{name}.yaml", scratch / "runs" / name
    more = () if weights is None else ("--from", weights)
    written, _ = run(
        "recipe", images.spec, "--out", preset, "--num-workers", 1, "--images", 200, *more
    )
    result: dict[str, Any] = {"set": images.name, "from_scratch": weights is None}
    if written.returncode:
        return {**result, "exit": written.returncode, "says": last_line(written)}, run_dir
    told = json.loads(written.stdout)
    overrides = [f"{key}={value}" for key, value in {**SMALL, **settings}.items()]
    done, seconds = run("train", preset, f"run_dir={run_dir}", *overrides)
    losses = [
        line["loss"]
        for file in sorted(run_dir.rglob("metrics.jsonl"))
        for line in map(json.loads, file.read_text().splitlines())
        if "loss" in line
    ]
    result |= {
        "base": told["base"],
        "cautions": len(told["cautions"]),
        "exit": done.returncode,
        "steps": len(losses),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": round(seconds, 1),
    }
    return result | ({"says": last_line(done)} if done.returncode else {}), run_dir


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The sentence with which a command ended."""
    return (done.stderr.strip().splitlines() or [""])[-1]


def main() -> int:
    """Train both presets of every set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--only", default="", help="a part of a set's name")
    options = parser.parse_args()
    folder, failed = options.data.resolve(), False
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        for images in sets_in(folder, scratch):
            if options.only not in images.name:
                continue
            say(f"{images.name}: from scratch, then going on from that, {STEPS} steps and more")
            first, run_dir = trained(images, scratch, FROM_SCRATCH)
            print(json.dumps(first), flush=True)
            second, _ = trained(images, scratch, GOING_ON, weights=run_dir)
            print(json.dumps(second), flush=True)
            failed |= any(each["exit"] or each["steps"] < STEPS for each in (first, second))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
