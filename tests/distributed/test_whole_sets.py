"""On several ranks, `embed` writes the bytes and `evaluate rank` the numbers of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dinoscale.errors import DinoscaleError
from dinoscale.evaluate.embedding.embed import EmbedOptions, embed
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.evaluate.label_free.rank import Samples, evaluate_rank
from tests.harness import run_distributed
from tests.unit.evaluate.tiny_files import save_picture, save_weights

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def write(weights: str, images: str, out: str) -> list[object]:
    """Images and new shards by the summary of this rank, and effective ranks; or its error."""
    torch.set_num_threads(1)
    options = EmbedOptions(
        batch_size=2, num_workers=0, shard_size=3, features=("cls", "patches"), progress=False
    )
    try:
        summary = embed(weights, images, out, options)
    except DinoscaleError as error:
        return [str(error)]
    extraction = ExtractionOptions(batch_size=8, num_workers=0, cache=False, progress=False)
    samples = Samples(lidar_images=7, views=3)
    report: dict[str, Any] = evaluate_rank(weights, images, samples=samples, options=extraction)
    return [summary["images"], summary["new_shards"], *report["score"].values()]


def _bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_two_and_three_ranks_write_what_one_writes(tmp_path: Path) -> None:
    weights, images = save_weights(tmp_path / "weights.safetensors"), tmp_path / "images"
    for i in range(13):  # five shards, for three ranks
        save_picture(images / f"{i:02d}.png", seed=i)
    (images / "07.png").write_bytes(b"not a picture")
    files = {"weights": str(weights), "images": str(images)}
    threads = torch.get_num_threads()
    expected = write(**files, out=str(tmp_path / "1"))
    assert expected[:2] == [12, 5]
    torch.set_num_threads(threads)
    alone = _bytes(tmp_path / "1")
    for world_size in (2, 3):
        out = tmp_path / str(world_size)
        found = run_distributed(
            "tests.distributed.test_whole_sets:write",
            **files,
            out=str(out),
            world_size=world_size,
            timeout_s=120,
        )
        assert found == [expected] * world_size
        assert _bytes(out) == alone
    (images / "07.png").unlink()
    first, second = run_distributed(
        "tests.distributed.test_whole_sets:write",
        **files,
        out=str(tmp_path / "3"),
        world_size=2,
        timeout_s=120,
    )
    assert "data.images is 13 there and 12 now" in first[0]
    assert "data.images is 13 there and 12 now" in second[0]
    assert _bytes(tmp_path / "3") == alone
