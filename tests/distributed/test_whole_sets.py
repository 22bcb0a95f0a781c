"""On several ranks, `embed` writes the bytes and `evaluate rank` the numbers of one process."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dinoscale.convert.weights_file import save_backbone
from dinoscale.errors import CheckpointError, DataError
from dinoscale.evaluate.correspondence.correspond import Given, evaluate_correspond
from dinoscale.evaluate.embedding.embed import EmbedOptions, embed
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.evaluate.label_free.rank import Samples, evaluate_rank
from dinoscale.runtime import distributed
from tests.harness import run_distributed
from tests.unit.evaluate.tiny_files import CARD, save_picture, save_weights

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def _write(weights: str, images: str, out: str, manifest: str | None = None) -> dict[str, object]:
    options = EmbedOptions(
        batch_size=2,
        num_workers=0,
        shard_size=3,
        features=("cls", "patches"),
        progress=False,
        manifest=manifest,
    )
    return embed(weights, images, out, options)


def measure(weights: str, images: str, out: str) -> list[object]:
    """Images and new shards by the summary of this rank, its effective ranks, and places found."""
    torch.set_num_threads(1)
    summary = _write(weights, images, out)
    extraction = ExtractionOptions(batch_size=8, num_workers=0, cache=False, progress=False)
    samples = Samples(lidar_images=7, views=3)
    report: dict[str, Any] = evaluate_rank(weights, images, samples=samples, options=extraction)
    given, of_files = (
        Given(images=images, warp=True, limit=5),
        {"input": {"images": {"number": 13}}},
    )
    places: dict[str, Any] = evaluate_correspond(
        weights, given, size=32, fingerprint={**of_files, "command": out}
    )
    scores = [*report["score"].values(), *places["score"].values()]
    return [summary["images"], summary["new_shards"], *scores]


def measure_and_fail(short: str, out: str, **files: str) -> tuple[list[object], str]:
    """The same, then the error of a stream whose last shard is too short."""
    os.environ["DINOSCALE_ALLOW_PIPE"] = "1"
    measured = measure(**files, out=out)
    try:
        _write(files["weights"], f"pipe:cat {short}", f"{out}-short", f"{short}.json")
    except DataError as error:
        return measured, str(error)
    return measured, ""


def embed_of_ranks(weights: list[str], images: str, out: str) -> str:
    """The error where every rank reads a file of its own."""
    try:
        _write(weights[distributed.rank()], images, out)
    except CheckpointError as error:
        return str(error)
    return ""


def _short_shard(path: Path, picture: bytes) -> Path:
    """A shard of five pictures, and a manifest that says eight."""
    with tarfile.open(path, "w") as tar:
        for i in range(5):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
    shards = [{"name": path.name, "samples": 8}]
    path.with_name(f"{path.name}.json").write_text(json.dumps({"format": 1, "shards": shards}))
    return path


def _bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_two_and_three_ranks_find_what_one_finds(tmp_path: Path) -> None:
    weights, images = save_weights(tmp_path / "weights.safetensors"), tmp_path / "images"
    for i in range(13):  # five shards, for three ranks
        save_picture(images / f"{i:02d}.png", seed=i)
    (images / "07.png").write_bytes(b"not a picture")
    short = _short_shard(tmp_path / "short.tar", (images / "00.png").read_bytes())
    files = {"weights": str(weights), "images": str(images)}
    threads = torch.get_num_threads()
    expected = measure(**files, out=str(tmp_path / "1"))
    torch.set_num_threads(threads)
    assert expected[:2] == [12, 5]
    module = "tests.distributed.test_whole_sets"
    three = run_distributed(
        f"{module}:measure", **files, out=str(tmp_path / "3"), world_size=3, timeout_s=120
    )
    assert three == [expected] * 3
    two = run_distributed(
        f"{module}:measure_and_fail",
        **files,
        out=str(tmp_path / "2"),
        short=str(short),
        world_size=2,
        timeout_s=120,
    )
    assert [measured for measured, _ in two] == [expected] * 2
    for name in "23":
        assert _bytes(tmp_path / name) == _bytes(tmp_path / "1")
    says = "holds only 5 pictures, but its manifest says 8"  # which rank 1 alone reads
    assert all(says in error for _, error in two), two
    assert not (tmp_path / "2-short" / "manifest.json").exists()
    assert (tmp_path / "2-short" / "unfinished.json").exists()


def test_ranks_with_other_weights_write_nothing(tmp_path: Path) -> None:
    weights = save_weights(tmp_path / "weights.safetensors")
    state = load_file(weights)
    state["norm.bias"] += 1
    save_backbone(tmp_path / "later.safetensors", state, CARD)
    save_picture(tmp_path / "images" / "0.png", seed=0)
    errors = run_distributed(
        "tests.distributed.test_whole_sets:embed_of_ranks",
        weights=[str(weights), str(tmp_path / "later.safetensors")],
        images=str(tmp_path / "images"),
        out=str(tmp_path / "out"),
        world_size=2,
        timeout_s=120,
    )
    assert all("rank 1 read other weights than rank 0" in error for error in errors), errors
    assert not (tmp_path / "out").exists()
