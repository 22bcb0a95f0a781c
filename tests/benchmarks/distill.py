"""A small student of a larger frozen teacher's features, and the same student from scratch.

    python -m tests.benchmarks.distill --imagenette imagenette224/ --out runs/distill

The teacher is a run of ours on photographs of Imagenette without labels, of which only the backbone
is used, as of released weights. The students see the same images in the same order, as many of
them: one learns by DINO, one the teacher's class and patch features alone, one both. Prints a line
of JSON for each, with the k-NN accuracy of its average over the images seen. A run that is there
already goes on, or is read; --teacher names another run with the same network in place of the
first, --students which of the students are trained.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

EPOCH = 25  # steps
TEACHER_STEPS, STEPS = 1350, 150
TEACHER = {
    "backbone": "vit_tiny_patch16_224",
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 2,
    "drop_path_rate": 0.0,
}
STUDENT = TEACHER | {"embed_dim": 64, "depth": 2}
_FEATURES = ["distill.class_feature_weight=1.0", "distill.patch_feature_weight=1.0"]
# Name of a student -> its settings beside the common ones.
STUDENTS = {
    "from_scratch": [],
    "features": [*_FEATURES, "dino.loss_weight=0.0", "crops.num_local=0"],
    "features_and_dino": _FEATURES,
}
_COMMON = [
    "crops.global_size=48",
    "crops.local_size=24",
    "crops.local_scale=[0.1, 0.4]",
    "head.num_prototypes=1024",
    "optim.lr=6e-3",
    "optim.min_lr=1e-5",
    "eval.resize=48",
    "eval.crop=48",
    "checkpoint.every_epochs=1000",
    "engine.precision=fp32",
    "log.every_steps=25",
    f"train.steps_per_epoch={EPOCH}",
]


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
    epochs = steps // EPOCH
    words = ["train", str(config), *_COMMON, f"run_dir={run_dir}", f"train.epochs={epochs}"]
    words += [f"data.train={shards}/train-*.tar", f"eval.train={shards}/train-*.tar"]
    words += [f"eval.test={shards}/val-*.tar", f"eval.every_epochs={epochs // 3}"]
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
    parser.add_argument("--imagenette", type=Path, required=True, help="folder of its tar shards")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--teacher", type=Path, help="a run whose backbone is the teacher's")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=[*STUDENTS])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    teacher = options.teacher or options.out / "teacher"
    if options.teacher is None:
        _train(teacher, options.imagenette, model=TEACHER, steps=TEACHER_STEPS, settings=[])
    print(json.dumps({"run": "teacher", "knn_top1": curve(teacher)}), flush=True)
    for name in options.students:
        settings = STUDENTS[name]
        run_dir = options.out / name
        taken_s = _train(
            run_dir,
            options.imagenette,
            model=STUDENT,
            steps=STEPS,
            settings=settings,
            teacher=teacher if settings else None,
        )
        result = {"run": name, "seconds": round(taken_s), "knn_top1": curve(run_dir)}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
