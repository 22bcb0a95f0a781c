"""Copies planted among the 50,000 training images of CIFAR-10, looked for by their embeddings.

    python -m tests.benchmarks.copies --cifar10 cifar10/ --out runs/copies

2,000 images get a copy of the same bytes, 2,000 one that is encoded again as JPEG of quality 60,
and 2,000 one enlarged to 48 pixels and encoded again; 500 others are added to the 10,000 test
images. The embedding of an image is its colours at 8 x 8, less the mean of all. The command runs
once to its end and once killed in the middle, then goes on: both lists must be equal. It prints one
line of JSON last: how many planted copies were found, what else was left out, minutes, and the most
memory.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.curation.embeddings import open_embeddings
from tests.benchmarks.measured import Used, measured
from tests.unit.data_tools.tiny_features import write_features

_SIDE = 8  # pixels of a picture whose colours are its embedding
_PLANTED = {"same": 2000, "encoded": 2000, "enlarged": 2000}
_IN_TEST = 500


def main(arguments: Sequence[str]) -> None:
    """Plant, search, and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.copies")
    parser.add_argument("--cifar10", type=Path, required=True, help="shards of CIFAR-10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threshold", type=float, default=0.98)
    parser.add_argument("--approximate", action="store_true", help="by faiss")
    options = parser.parse_args(arguments)
    print(json.dumps(_measured(options)))


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    place: Path = options.out
    if not (place / "test" / "manifest.json").exists():
        _plant(options.cifar10, place)
    planted: dict[str, dict[str, str]] = json.loads((place / "planted.json").read_text())
    summary, used = _deduplicated(options, "whole")
    killed = _killed(options, after_s=used.wall_s / 2)
    _deduplicated(options, "resumed")
    kept = {Path(line).name for line in (place / "whole.txt").read_text().splitlines()}
    found = {
        kind: sum(copy not in kept or original not in kept for copy, original in pairs.items())
        for kind, pairs in planted.items()
    }
    gone = {name for pairs in planted.values() for pair in pairs.items() for name in pair}
    resumed = (place / "resumed.txt").read_bytes() == (place / "whole.txt").read_bytes()
    return {
        **summary,
        "planted": {kind: len(pairs) for kind, pairs in planted.items()},
        "least_cosine": _least_cosines(place, planted),
        "found": found,
        "others_left_out": sum(name not in kept for name in _names(place) if name not in gone),
        "minutes": round(used.wall_s / 60, 2),
        "peak_mb": used.peak_mb,
        "killed": killed,
        "resumed_equal": resumed,
    }


def _command(options: argparse.Namespace, name: str) -> list[str]:
    place = options.out
    words = ["data", "deduplicate-embeddings", place / "features", place / f"{name}.txt"]
    words += ["--threshold", options.threshold, "--against", place / "test"]
    words += ["--approximate"] * options.approximate
    return [sys.executable, "-m", "dinoscale", *map(str, words)]


def _deduplicated(options: argparse.Namespace, name: str) -> tuple[dict[str, Any], Used]:
    printed, used = measured(_command(options, name))
    return json.loads(printed.splitlines()[-1]), used


def _killed(options: argparse.Namespace, *, after_s: float) -> bool:
    """Kill the command; whether it was still running."""
    process = subprocess.Popen(_command(options, "resumed"), stdout=subprocess.DEVNULL)
    time.sleep(after_s)
    process.kill()
    return process.wait() == -signal.SIGKILL


def _names(place: Path) -> list[str]:
    return sorted(path.name for path in (place / "images").iterdir())


def _least_cosines(place: Path, planted: dict[str, dict[str, str]]) -> dict[str, float]:
    """Of the copies of each kind and their originals among the images."""
    embeddings = open_embeddings(place / "features")
    rows = embeddings.rows(0, len(embeddings))
    row = {name: i for i, name in enumerate(embeddings.names(np.arange(len(rows))))}
    least = {}
    for kind, pairs in planted.items():
        one, other = (rows[[row[name] for name in names]] for names in (pairs, pairs.values()))
        least[kind] = round(float((one * other).sum(axis=1).min()), 4)
    return least


def _plant(shards: Path, place: Path) -> None:
    """Write images and copies, and the embeddings of both and of the test images."""
    images = place / "images"
    images.mkdir(parents=True, exist_ok=True)
    pictures, tests = (dict(_pictures(shards, split)) for split in ("train", "test"))
    chosen = np.random.default_rng(0).permutation(sorted(pictures)).tolist()
    planted: dict[str, dict[str, str]] = {}
    copies: dict[str, bytes] = {}
    for kind, number in _PLANTED.items():
        originals, chosen = chosen[:number], chosen[number:]
        planted[kind] = {f"{kind}-{name}": name for name in originals}
        copies |= {f"{kind}-{name}": _copied(pictures[name], kind) for name in originals}
    in_test = chosen[:_IN_TEST]
    planted["in test"] = {name: name for name in in_test}
    files = pictures | copies
    names = np.random.default_rng(2).permutation(sorted(files)).tolist()
    for name in names:
        (images / name).write_bytes(files[name])
    rows = np.stack([_colours(files[name]) for name in names])
    mean = rows.mean(axis=0)
    tests |= {f"planted-{name}": pictures[name] for name in in_test}
    test_images = place / "test images"
    test_images.mkdir()
    for name, picture in tests.items():
        (test_images / name).write_bytes(picture)
    of_test = np.stack([_colours(picture) for picture in tests.values()]) - mean
    write_features(
        place / "features", {"cls": rows - mean}, names=names, spec=str(images), shard_size=4096
    )
    write_features(
        place / "test",
        {"cls": of_test},
        names=[*tests],
        spec=str(test_images),
        shard_size=4096,
    )
    (place / "planted.json").write_text(json.dumps(planted))


def _pictures(shards: Path, split: str) -> Iterator[tuple[str, bytes]]:
    """Name and file of every image."""
    for shard in sorted(shards.glob(f"{split}-*.tar*")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield Path(member.name).name, file.read()


def _copied(picture: bytes, kind: str) -> bytes:
    if kind == "same":
        return picture
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    if kind == "enlarged":
        image = image.resize((48, 48), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60 if kind == "encoded" else 90)
    return buffer.getvalue()


def _colours(picture: bytes) -> NDArray[np.float32]:
    """(192,), from 0 to 1."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel() / 255


if __name__ == "__main__":
    main(sys.argv[1:])
