"""Going on from weights on other images: k-NN before and after, and what the guard does.

    python -m tests.benchmarks.adapt --cifar10 cifar10/ --out runs/adapt

A small ViT learns the classes 0-4 of CIFAR-10 without labels; its weights stand for released ones.
The runs on images of the classes 5-9 begin with them: a cautious one (heads first, then all at a
low rate), one whose backbone rests, and one at 30 times that rate, three times: its guard warns,
stops, or rolls back. Prints a line of JSON for each, and last the rank correlation of k-NN and each
measure without labels over all measurements: of one number, if two starts measured the same.
"""

import argparse
import io
import json
import math
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import spearmanr

from dinoscale.runtime.outputs import BEST_WEIGHTS

SOURCE_EPOCHS, SOURCE_STEPS = 24, 50  # of an epoch
EVERY = 25  # steps between two measurements, and of an epoch; below, all are in these
HEADS, ALL, HOT = 1, 8, 6
RATE = 2e-3  # the source's is 8e-3
HALVES = {"source": range(5), "target": range(5, 10)}
# What is learned from, and the bank and the queries of k-NN: shards of CIFAR-10.
SPLITS = {"train": "train-*.tar*", "bank": "train-000.tar*", "test": "test-000.tar*"}
IMAGES = {"train": 25_000, "bank": 2000, "test": 1000}  # at most, the first ones
_SIZES = [
    "crops.global_size=32",
    "crops.local_size=16",
    "model.embed_dim=96",
    "model.depth=4",
    "eval.resize=32",
    "eval.crop=32",
    "checkpoint.every_epochs=1000",
    "engine.precision=fp32",
    "log.every_steps=50",
]
# It judges by RankMe, its default, and its default margin: nothing here needs a label but k-NN.
_GUARD = [
    f"guard.every_steps={EVERY}",
    "guard.num_images=512",
    "guard.lidar_views=4",
    "eval.every_epochs=1",
]
LABEL_FREE = ("guard_rankme", "guard_lidar", "guard_alpha_req", "guard_agreement")


def _phases(*, epochs: int) -> list[dict[str, Any]]:
    """Heads first, then all for some epochs, as in the presets `adapt_*`."""
    heads = {"optim": {"backbone_lr": 0.0}, "train": {"epochs": HEADS}}
    return [
        {"name": "heads", "change": heads},
        {"name": "all", "change": {"train": {"epochs": epochs}}},
    ]


# Name of a run -> its phases, rate, and what its guard does.
RUNS: dict[str, tuple[list[dict[str, Any]], float, str]] = {
    "cautious": (_phases(epochs=ALL), RATE, "stop"),
    "backbone rests": (_phases(epochs=ALL)[:1], RATE, "stop"),
    "hot": (_phases(epochs=HOT), 30 * RATE, "warn"),
    "hot, stops": (_phases(epochs=HOT), 30 * RATE, "stop"),
    "hot, rolls back": (_phases(epochs=HOT), 30 * RATE, "roll_back"),
}


def halves(shards: Path, out: Path) -> None:
    """Write `HALF-SPLIT.tar` of the images of five classes each; classes from 0."""
    out.mkdir(parents=True, exist_ok=True)
    for half, classes in HALVES.items():
        for split, shards_of_split in SPLITS.items():
            target = out / f"{half}-{split}.tar"
            if target.exists():
                continue
            part = target.with_suffix(".part")
            with tarfile.open(part, "w") as tar:
                found = samples(sorted(shards.glob(shards_of_split)))
                of_half = (sample for sample in found if sample[2] in classes)
                for name, jpeg, label in islice(of_half, IMAGES[split]):
                    _add(tar, f"{name}.jpg", jpeg)
                    _add(tar, f"{name}.cls", str(label - classes.start).encode())
            part.rename(target)


def samples(shards: Sequence[Path]) -> Iterator[tuple[str, bytes, int]]:
    """Name, JPEG and class of every image of CIFAR-10's shards, packed or not."""
    for path in shards:
        found: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                name, _, kind = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(name, {})[kind] = file.read()
        for name, parts in found.items():
            yield name, parts["jpg"], int(parts["cls"])


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _train(
    run_dir: Path,
    sets: dict[str, Path],
    settings: Sequence[str],
    phases: Sequence[dict[str, Any]] = (),
) -> int:
    config = run_dir.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({"defaults": ["quickstart"], "phases": list(phases)}))
    words = ["train", str(config), *_SIZES, f"run_dir={run_dir}"]
    words += [f"data.train={sets['train']}", f"eval.train={sets['bank']}"]
    words += [f"eval.test={sets['test']}", *settings]
    return subprocess.run([sys.executable, "-m", "dinoscale", *words], check=False).returncode


def _log(run_dir: Path, name: str) -> list[dict[str, Any]]:
    folders = [run_dir, *sorted(run_dir.glob("phases/*"))]
    return [
        json.loads(line)
        for folder in folders
        if (folder / name).exists()
        for line in (folder / name).read_text().splitlines()
    ]


def measurements(run_dir: Path) -> list[dict[str, float]]:
    """k-NN and the numbers of the guard of each measurement, in order."""
    found: list[dict[str, float]] = []
    for line in _log(run_dir, "metrics.jsonl"):
        if "knn_top1" in line:
            found.append(line)
        elif "guard_rankme" in line:  # is measured after k-NN
            found[-1] |= line
    return found


def rank_correlations(found: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Spearman's rho of k-NN and each measure without labels; None where one never changes."""
    rhos = {}
    for name in LABEL_FREE:
        pairs = sorted({(line[name], line["knn_top1"]) for line in found if name in line})
        changes = len(pairs) > 2 and all(len(set(side)) > 1 for side in zip(*pairs, strict=True))
        rho = float(spearmanr(*zip(*pairs, strict=True)).statistic) if changes else math.nan
        rhos[name.removeprefix("guard_")] = None if math.isnan(rho) else round(rho, 2)
    return rhos


def main() -> None:
    """Train all runs; a run that is there already goes on, or is read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar10", type=Path, required=True, help="folder of its tar shards")
    parser.add_argument("--out", type=Path, required=True, help="folder of sets and runs")
    options = parser.parse_args()
    halves(options.cifar10, options.out / "sets")
    sets = {
        half: {split: options.out / "sets" / f"{half}-{split}.tar" for split in SPLITS}
        for half in HALVES
    }
    source = options.out / "source"
    _train(
        source,
        sets["source"],
        [
            f"train.epochs={SOURCE_EPOCHS}",
            f"train.steps_per_epoch={SOURCE_STEPS}",
            "eval.every_epochs=1000",
        ],
    )
    all_found: list[dict[str, float]] = []
    for name, (phases, rate, on_fall) in RUNS.items():
        run_dir = options.out / name.replace(", ", "_").replace(" ", "_")
        code = _train(
            run_dir,
            sets["target"],
            [
                f"train.init_from={source}",
                f"optim.lr={rate}",
                "optim.min_lr=1e-6",
                f"train.steps_per_epoch={EVERY}",
                *_GUARD,
                f"guard.on_fall={on_fall}",
            ],
            phases,
        )
        found = measurements(run_dir)
        all_found += found
        best = max(found, key=lambda line: line["knn_top1"])
        print(
            json.dumps(
                {
                    "run": name,
                    "exit_code": code,
                    "knn_before": found[0]["knn_top1"],
                    "knn_after": found[-1]["knn_top1"],
                    "measurements": len(found),
                    "knn_best": best["knn_top1"],
                    "knn": [round(line["knn_top1"], 1) for line in found],
                    "rankme": [round(line["guard_rankme"], 1) for line in found],
                    "lidar": [round(line["guard_lidar"], 1) for line in found],
                    "rank_correlations": rank_correlations(found),
                    "exported": sorted(
                        str(path.relative_to(run_dir)) for path in run_dir.rglob(BEST_WEIGHTS)
                    ),
                    "events": [
                        line["text"] for line in _log(run_dir, "events.jsonl") if "text" in line
                    ],
                }
            ),
            flush=True,
        )
    different = {tuple(line.get(name) for name in ("knn_top1", *LABEL_FREE)) for line in all_found}
    about = {"measurements": len(all_found), "different": len(different)}
    print(json.dumps({**about, "rank_correlations": rank_correlations(all_found)}))


if __name__ == "__main__":
    main()
