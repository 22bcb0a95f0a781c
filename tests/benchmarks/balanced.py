"""A training on a balanced choice of a skewed set against one on a random choice of as many images.

    python -m tests.benchmarks.balanced --cifar10 cifar10/ --weights WEIGHTS --out runs/balanced

The skewed set is that of `tests.benchmarks.curation cifar`: of class c (1 / ratio)^(c / 9) of its
training images. It is embedded by --weights, clustered, and chosen from evenly over the clusters by
the commands. Beside that list stand a random one, and one as even over the classes as labels can
make it, which says what there is to gain. A small ViT learns from each list by DINO, as many steps;
its average is measured on a test set of even classes. Prints a line of JSON for each list and each
training, and one of all last. What is finished is not repeated.
"""

import argparse
import gzip
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.curation import dinoscale, require_same_arguments, unpacked
from tests.benchmarks.distill import EPOCH, POINTS, STUDENT, Scores, accuracies, train

LEVELS, ITERATIONS, RESAMPLING = (500, 100, 20), 20, 5  # as of `curation cifar`
MODEL = STUDENT | {"patch_size": 4}
SETTINGS = ["crops.local_scale=[0.1, 0.4]", "head.num_prototypes=1024", "optim.min_lr=1e-5"]
SETTINGS += ["eval.resize=24", "eval.crop=24"]  # the size of global crops
MEASURED = {"bank": "train-000.tar", "test": "test-000.tar"}


def lists(options: argparse.Namespace) -> dict[str, Path]:
    """Write three lists of images: balanced, random, even over classes."""
    images = options.out / "images"
    labels, names = unpacked(options.cifar10, images, ratio=options.ratio)
    if options.choose > len(names):
        raise SystemExit(f"--choose {options.choose}: need at most {len(names)}, the skewed set")
    rng = np.random.default_rng(0)
    chosen = {"random": rng.permutation(len(names)).tolist()}
    left, even = rng.permutation(len(names)), list[int]()
    while len(even) < options.choose:  # one of each class that has some left, again and again
        _, first = np.unique(np.array(labels)[left], return_index=True)
        even += left[first].tolist()
        left = np.delete(left, first)
    found = {"balanced": options.out / "balanced.txt"}
    if not found["balanced"].exists():
        _balance(options, images, found["balanced"])
    for name, numbers in (chosen | {"even_classes": even}).items():
        found[name] = options.out / f"{name}.txt"
        lines = (f"images/{names[i]}\n" for i in sorted(numbers[: options.choose]))
        found[name].write_text("".join(lines))
    return found


def _balance(options: argparse.Namespace, images: Path, chosen: Path) -> None:
    features, clusters = options.out / "features", options.out / "clusters"
    words = ["--resize", options.size, "--crop", options.size, "--num-workers", 0]
    dinoscale("embed", options.weights, images, features, *words, "--features", "cls")
    words = ["--levels", *LEVELS, "--iterations", ITERATIONS, "--resampling", RESAMPLING]
    dinoscale("data", "cluster", features, clusters, *words)
    dinoscale("data", "balance", clusters, chosen, "--images", options.choose)


def classes_of(path: Path) -> dict[str, Any]:
    """Images of each class on a list, and the entropy over classes in nats."""
    labels = [int(Path(line).parent.name) for line in path.read_text().splitlines()]
    counts = np.bincount(labels, minlength=10)
    shares = counts[counts > 0] / counts.sum()
    return {"of_classes": counts.tolist(), "entropy": round(-float(shares @ np.log(shares)), 2)}


def main(arguments: Sequence[str]) -> None:
    """Choose, train, measure."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.balanced",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cifar10", type=Path, required=True, help="folder of its tar.gz shards")
    parser.add_argument("--weights", type=Path, required=True, help="that embed the images")
    parser.add_argument("--size", type=int, default=32, help="pixels that these see (default 32)")
    parser.add_argument("--out", type=Path, required=True, help="folder of images and runs")
    parser.add_argument("--ratio", type=float, default=100.0, help="of classes (default 100)")
    parser.add_argument("--choose", type=int, default=2000, help="images (default 2000)")
    parser.add_argument("--steps", type=int, default=400, help="of a training (default 400)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default 0 1")
    options = parser.parse_args(arguments)
    if options.steps % (POINTS * EPOCH):
        parser.error(f"--steps {options.steps}: need a multiple of {POINTS * EPOCH}")
    require_same_arguments(parser, options, but=["seeds"])
    _measure_all(options)


def _measure_all(options: argparse.Namespace) -> None:
    found = lists(options)
    for name in MEASURED.values():
        with gzip.open(options.cifar10 / f"{name}.gz") as packed:
            plain = options.out / name
            if not plain.exists():
                with plain.open("wb") as file:
                    shutil.copyfileobj(packed, file)
    results: dict[str, Any] = {}
    for name, path in found.items():
        results[name] = {**classes_of(path), "accuracies": []}
        print(json.dumps({"list": name, **results[name]}), flush=True)
    for seed in options.seeds:
        for name, path in found.items():
            results[name]["accuracies"].append(_trained(options, path, seed))
    print(json.dumps(results))


def _trained(options: argparse.Namespace, images: Path, seed: int) -> Scores:
    began, run_dir = time.monotonic(), options.out / f"{images.stem}_{seed}"
    settings = [*SETTINGS, f"seed={seed}"]
    how = {"model": MODEL, "steps": options.steps, "settings": settings}
    checkpoints = train(run_dir, str(images), **how)
    sets = {use: str(options.out / name) for use, name in MEASURED.items()}
    [scores] = accuracies(checkpoints[-1:], run_dir / "accuracies", **sets)["weights"]
    minutes = round((time.monotonic() - began) / 60, 1)
    print(json.dumps({"run": run_dir.name, "minutes": minutes, **scores}), flush=True)
    return scores


if __name__ == "__main__":
    main(sys.argv[1:])
