"""A small student of a larger frozen teacher's features, and the same student from scratch.

    python -m tests.benchmarks.distill --cifar10 cifar10/ --out runs/distill

The teacher is a run of ours on CIFAR-10 without labels, of which only the backbone is used, as of
released weights. The students see the same images in the same order, as many of them: one learns by
DINO, one the teacher's class and patch features alone, one both. Prints a line of JSON for each,
with the k-NN accuracy of its average over the images seen. A run that is there already goes on, or
is read; --teacher names another run with the same network in place of the first.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

EPOCH = 50  # steps
TEACHER_STEPS, STEPS, EVERY = 1200, 300, 100
TEACHER = {
    "backbone": "vit_tiny_patch16_224",
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 2,
    "drop_path_rate": 0.0,
}
STUDENT = TEACHER | {"embed_dim": 48, "depth": 2}
_FEATURES = ["distill.class_feature_weight=1.0", "distill.patch_feature_weight=1.0"]
# Name of a student -> its settings beside the common ones.
STUDENTS = {
    "from scratch": [],
    "features": [*_FEATURES, "dino.loss_weight=0.0", "crops.num_local=0"],
    "features and DINO": _FEATURES,
}
_SIZES = [
    "crops.global_size=32",
    "crops.local_size=16",
    "eval.resize=32",
    "eval.crop=32",
    "checkpoint.every_epochs=1000",
    "engine.precision=fp32",
    "log.every_steps=50",
    f"train.steps_per_epoch={EPOCH}",
]


def plain_tars(shards: Path, out: Path) -> None:
    """Write the shards without compression, which a run reads."""
    out.mkdir(parents=True, exist_ok=True)
    for packed in sorted(shards.glob("t*.tar.gz")):
        target = out / packed.stem
        if not target.exists():
            part = target.with_suffix(".part")
            with gzip.open(packed) as source, part.open("wb") as written:
                shutil.copyfileobj(source, written)
            part.rename(target)


def _train(
    run_dir: Path,
    shards: Path,
    *,
    model: dict[str, Any],
    steps: int,
    settings: Sequence[str],
    teacher: Path | None = None,
) -> float:
    """Train a run, or go on with it; seconds."""
    config = run_dir.with_suffix(".yaml")
    given: dict[str, Any] = {"defaults": ["quickstart"], "model": model}
    if teacher is not None:
        given["distill"] = {"teacher": str(teacher), "model": TEACHER}
    config.write_text(yaml.safe_dump(given))
    words = ["train", str(config), *_SIZES, f"run_dir={run_dir}", f"train.epochs={steps // EPOCH}"]
    words += [f"data.train={shards}/train-*.tar", f"eval.train={shards}/train-000.tar"]
    words += [f"eval.test={shards}/test-000.tar", f"eval.every_epochs={EVERY // EPOCH}"]
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "dinoscale", *words, *settings], check=True)
    return time.monotonic() - begin


def curve(run_dir: Path) -> dict[int, float]:
    """Images seen -> k-NN accuracy of the average, in percent."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["images"]: round(line["knn_top1"], 1) for line in lines if "knn_top1" in line}


def main() -> None:
    """Train teacher and students, and print what became of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar10", type=Path, required=True, help="folder of its tar shards")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--teacher", type=Path, help="a run whose backbone is the teacher's")
    options = parser.parse_args()
    shards = options.out / "sets"
    plain_tars(options.cifar10, shards)
    teacher = options.teacher or options.out / "teacher"
    if options.teacher is None:
        taken_s = _train(teacher, shards, model=TEACHER, steps=TEACHER_STEPS, settings=[])
        print(
            json.dumps({"run": "teacher", "seconds": round(taken_s), "knn_top1": curve(teacher)}),
            flush=True,
        )
    for name, settings in STUDENTS.items():
        run_dir = options.out / name.replace(" ", "_")
        taken_s = _train(
            run_dir,
            shards,
            model=STUDENT,
            steps=STEPS,
            settings=settings,
            teacher=teacher if settings else None,
        )
        result = {"run": name, "seconds": round(taken_s), "knn_top1": curve(run_dir)}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
