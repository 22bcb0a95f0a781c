"""Clusters and balance on a real set of skewed classes, and clusters of many embeddings.

    python -m tests.benchmarks.curation cifar --cifar10 cifar10/ --out runs/curation
    python -m tests.benchmarks.curation synthetic --out runs/synthetic --images 10000000

`cifar` keeps of class c (1 / ratio)^(c / 9) of its 5,000 training images, clusters what is left by
raw pixels, or by the features of --weights, and chooses images evenly: the entropy over classes
tells what the labels, which only it sees, say of the choice. `synthetic` draws embeddings in blobs
of very different sizes, a block at a time, clusters them by the command and says how long that
takes and how much memory; it needs 130 bytes of disk for an embedding of width 64, and removes them
unless --keep. Each prints one line of JSON last.
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.benchmarks.measured import Used, measured
from tests.unit.data_tools.tiny_features import Block, write_blocks, write_features

_BLOCK = 2**16  # embeddings
_BLOBS = 5000
_SIDE = 16  # pixels of a picture whose colours are its features


def main(arguments: Sequence[str]) -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.curation")
    kinds = parser.add_subparsers(dest="kind", required=True)
    cifar = kinds.add_parser("cifar")
    cifar.add_argument("--cifar10", type=Path, required=True, help="shards of CIFAR-10")
    cifar.add_argument("--ratio", type=float, default=100.0, help="of the classes (default 100)")
    cifar.add_argument("--weights", help="features of this network instead of pixels")
    cifar.add_argument("--choose", type=int, default=2000, help="images (default 2000)")
    cifar.set_defaults(measure=_cifar, levels=[500, 100, 20], iterations=20, resampling=[5])
    synthetic = kinds.add_parser("synthetic")
    synthetic.add_argument("--images", type=int, default=10_000_000)
    synthetic.add_argument("--width", type=int, default=64)
    synthetic.add_argument("--keep", action="store_true")
    synthetic.set_defaults(
        measure=_synthetic, levels=[1000, 100, 10], iterations=5, resampling=[0, 5, 5]
    )
    for kind in (cifar, synthetic):
        kind.add_argument("--out", type=Path, required=True)
        kind.add_argument("--levels", type=int, nargs="+", default=kind.get_default("levels"))
        kind.add_argument("--iterations", type=int, default=kind.get_default("iterations"))
        kind.add_argument(
            "--resampling", type=int, nargs="+", default=kind.get_default("resampling")
        )
    options = parser.parse_args(arguments)
    require_same_arguments(parser, options)
    print(json.dumps(options.measure(options)))


def require_same_arguments(
    parser: argparse.ArgumentParser, options: argparse.Namespace, *, but: Sequence[str] = ()
) -> None:
    """End where --out was begun with other arguments, since what is finished is not repeated.

    Args:
        parser: says so.
        options: that are kept in --out; what is in it already counts as made with these.
        but: names of those that may differ.
    """
    given = {
        name: str(value)
        for name, value in vars(options).items()
        if name not in {"out", "measure", *but}
    }
    kept = options.out / "arguments.json"
    before = json.loads(kept.read_text()) if kept.exists() else given
    for name in sorted(given.keys() | before.keys()):
        if given.get(name) != before.get(name):
            parser.error(
                f"{options.out} was begun with {name} {before.get(name)}, not {given.get(name)};"
                " choose another --out"
            )
    options.out.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(given))


def _cifar(options: argparse.Namespace) -> dict[str, Any]:
    images, features, clusters = (options.out / name for name in ("images", "features", "clusters"))
    labels, names = unpacked(options.cifar10, images, ratio=options.ratio)
    if options.weights is not None:
        sizes = ["--resize", "32", "--crop", "32"]
        dinoscale("embed", options.weights, str(images), str(features), *sizes)
    elif not (features / "manifest.json").exists():
        pixels = np.stack([_pixels(images / name) for name in names])
        pixels -= pixels.mean(axis=0)
        write_features(
            features, {"cls": pixels}, names=names, labels=labels, spec=str(images), shard_size=4096
        )
    found = _clustered(options, features, clusters)
    chosen = options.out / "balanced.txt"
    record = dinoscale("data", "balance", str(clusters), str(chosen), "--images", options.choose)
    return {
        "images": len(names),
        "of_classes": np.bincount(labels).tolist(),
        "by": options.weights or "pixels",
        **found,
        "chosen": record["images"],
        "entropy": record["entropy"],
    }


def unpacked(shards: Path, images: Path, *, ratio: float) -> tuple[list[int], list[str]]:
    """Labels and names of the training images of skewed classes, written as `CLASS/KEY.jpg`."""
    left: dict[int, int] = {}
    labels, names = [], []
    for label, key, picture in _pairs(shards):
        if left.setdefault(label, round(5000 * ratio ** (-label / 9))):
            left[label] -= 1
            path = images / str(label) / f"{key}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(picture)
            labels.append(label)
            names.append(f"{label}/{path.name}")
    return labels, names


def _pairs(shards: Path) -> Iterator[tuple[int, str, bytes]]:
    """Label, key and file of every training image."""
    for shard in sorted(shards.glob("train-*.tar*")):
        with tarfile.open(shard) as tar:
            found: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, kind = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                sample = found.setdefault(key, {})
                sample[kind] = file.read()
                if len(sample) == 2:
                    yield int(sample["cls"]), key.rpartition("/")[2], sample["jpg"]
                    del found[key]


def _pixels(path: Path) -> NDArray[np.float32]:
    picture = Image.open(io.BytesIO(path.read_bytes())).convert("RGB").resize((_SIDE, _SIDE))
    return np.asarray(picture, dtype=np.float32).ravel() / 255


def _synthetic(options: argparse.Namespace) -> dict[str, Any]:
    features, clusters = options.out / "features", options.out / "clusters"
    began = time.monotonic()
    if not (features / "manifest.json").exists():
        number = -(-options.images // _BLOCK)
        write_blocks(features, _drawn(options.images, options.width), num_blocks=number)
    written = time.monotonic()
    found = _clustered(options, features, clusters)
    if not options.keep:
        shutil.rmtree(features)
        shutil.rmtree(clusters)
    return {
        "images": options.images,
        "width": options.width,
        "minutes_to_write": round((written - began) / 60, 1),
        **found,
    }


def _drawn(images: int, width: int) -> Iterator[Block]:
    """Embeddings around centers, of which the i-th has a share of 1 / (i + 10)."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(_BLOBS, width)).astype(np.float32)
    shares = 1 / (np.arange(_BLOBS) + 10)
    edges = np.cumsum(shares / shares.sum())
    for start in range(0, images, _BLOCK):
        number = min(_BLOCK, images - start)
        blob = np.searchsorted(edges, rng.random(number)).clip(max=_BLOBS - 1)
        noise = rng.standard_normal((number, width), dtype=np.float32)
        rows = (centers[blob] + 0.5 * noise).astype(np.float16)
        yield Block({"cls": rows}, [f"{start + i}.jpg" for i in range(number)])


def _clustered(options: argparse.Namespace, features: Path, clusters: Path) -> dict[str, Any]:
    found, used = _measured(
        *("data", "cluster", str(features), str(clusters)),
        *("--levels", *options.levels),
        *("--iterations", options.iterations),
        *("--resampling", *options.resampling),
    )
    return {
        "levels": [level["clusters"] for level in found["levels"]],
        "iterations": options.iterations,
        "resampling": options.resampling,
        "minutes_to_cluster": round(used.wall_s / 60, 1),
        "cpu_minutes_to_cluster": round(used.cpu_s / 60, 1),
        "peak_mb": used.peak_mb,
    }


def dinoscale(*words: object) -> dict[str, Any]:
    """What a command prints last."""
    return _measured(*words)[0]


def _measured(*words: object) -> tuple[dict[str, Any], Used]:
    command = [sys.executable, "-m", "dinoscale", *map(str, words)]
    printed, used = measured(command)
    return json.loads(printed.splitlines()[-1]), used


if __name__ == "__main__":
    main(sys.argv[1:])
