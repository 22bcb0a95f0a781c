"""Clusters made by several ranks equal those of one process bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.curation.hierarchy import ClusterOptions, cluster
from data_tools.curation.kmeans import TILE
from dinoscale.errors import DataError
from tests.harness import run_distributed
from tests.unit.data_tools.tiny_features import write_features

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

OPTIONS = ClusterOptions(levels=(12,), iterations=2, resampling=(1,), start="random")


def of_rank(good: str, bad: str, out: str) -> str:
    """Cluster two folders, of which the second cannot be; say why."""
    cluster(Path(good), Path(out), OPTIONS)
    with pytest.raises(DataError) as error:
        cluster(Path(bad), Path(f"{out}-bad"), OPTIONS)
    return str(error.value)


def test_ranks_share_the_images_and_a_failure_of_one_reaches_all(tmp_path: Path) -> None:
    """Three ranks have the tiles of two, so one has none; the last tile is not whole.

    Most images are equal, so that several centroids begin there, and all but one lose them.
    """
    rows = np.random.default_rng(0).normal(size=(TILE + 50, 4)).astype(np.float32)
    rows[:1500] = 1
    good = write_features(tmp_path / "good", {"cls": rows}, shard_size=700)
    rows[-1, 0] = np.inf
    bad = write_features(tmp_path / "bad", {"cls": rows}, shard_size=700)
    one = tmp_path / "one"
    cluster(good, one, OPTIONS)
    found = run_distributed(
        "tests.distributed.test_cluster:of_rank",
        world_size=3,
        timeout_s=120,
        good=str(good),
        bad=str(bad),
        out=str(tmp_path / "three"),
    )
    for path in one.glob("*.npy"):
        assert (tmp_path / "three" / path.name).read_bytes() == path.read_bytes(), path.name
    for text in found:
        assert f"{TILE + 49:05d}.jpg (row {TILE + 49}) are not finite" in text
