"""Copies and clusters of seeds found by several ranks are those of one process."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_tools.curation import search
from data_tools.curation.clusters import Clusters, Level
from data_tools.curation.duplicates import deduplicate_embeddings
from data_tools.curation.groups import Similar
from data_tools.curation.hierarchy import ClusterOptions, cluster
from data_tools.curation.retrieve import ByCluster, Output, retrieve_clusters
from data_tools.curation.search import Way, in_turns
from dinoscale.errors import ConfigError, DataError
from dinoscale.runtime import distributed
from tests.harness import run_distributed
from tests.unit.data_tools.tiny_features import write_features
from tests.unit.evaluate.tiny_files import save_picture

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


def of_rank(good: str, bad: str, clusters: str, out: str) -> str:
    """Leave out the copies in two folders, of which the second cannot be read; say why."""
    _without_a_piece()
    _without_faiss_on_one_rank(Path(good), Path(out).with_name("none.txt"))
    _with_another_faiss_on_one_rank()
    of_seeds(Path(good), Path(clusters), Path(out).with_name("seeds.txt"))
    found(Path(good), Path(out))
    with pytest.raises(DataError) as error:
        found(Path(bad), Path(out).with_name("bad.txt"))
    return str(error.value)


def _without_faiss_on_one_rank(features: Path, out: Path) -> None:
    """All ranks are told, and none waits for the other."""
    with pytest.MonkeyPatch.context() as patch:
        there = SimpleNamespace(__version__="1")
        patch.setitem(sys.modules, "faiss", None if distributed.rank() else there)
        with pytest.raises(ConfigError, match="--approximate needs faiss"):
            found(features, out, approximate=True)


def _with_another_faiss_on_one_rank() -> None:
    """The work of all ranks has one name."""
    with pytest.MonkeyPatch.context() as patch:
        version = SimpleNamespace(__version__=str(distributed.rank()))
        patch.setattr(search, "require_faiss", lambda: version)
        settings = search.settings_of(Way(20, torch.device("cpu"), approximate=True))
    assert [each["faiss"] for each in distributed.gather_objects(settings)] == ["0", "0"]


def of_seeds(features: Path, clusters: Path, out: Path) -> None:
    """Take images of the clusters of seeds, which are the images."""
    read, gather = Clusters.level, distributed.gather_objects
    read_s: list[float] = []
    waited_s: list[tuple[float, float]] = []

    def slowly(folder: Clusters, number: int) -> Level:
        time.sleep(0.3)
        read_s.append(time.monotonic())
        return read(folder, number)

    def recorded(value: object) -> list[object]:
        begin_s = time.monotonic()
        found = gather(value)
        waited_s.append((begin_s, time.monotonic()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clusters, "level", slowly)
        patch.setattr(distributed, "gather_objects", recorded)
        if distributed.rank():  # others need no array but the centroids, which they are given
            patch.setattr(Clusters, "level", lambda *_: pytest.fail("read by another rank"))
        retrieve_clusters(
            *(None, features, clusters, Output(out)),
            ByCluster(min_seeds=8, per_cluster=5, images=None, seed=0),
            device=torch.device("cpu"),
            progress=False,
        )
    # Nor does any wait for it in a collective, which could time out; all have one clock.
    (end_s,) = [end for ends in gather(read_s) for end in ends]
    assert all(not begin < end_s < end for begin, end in waited_s)


def _without_a_piece() -> None:
    """A rank without a piece enters no collective, which could time out, while another works."""
    entered_s: list[float] = []
    end_s: list[float] = []
    gather = distributed.gather_objects

    def recorded(value: object) -> list[object]:
        entered_s.append(time.monotonic())
        return gather(value)

    def find(_: int) -> dict[str, float]:
        time.sleep(0.3)
        end_s.append(time.monotonic())
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "gather_objects", recorded)
        in_turns(find, [1], None, progress=False)
    last_s = max(end for ends in gather(end_s) for end in ends)  # all have one clock
    assert min(entered_s) >= last_s


def found(features: Path, out: Path, *, approximate: bool = False) -> None:
    """Leave out copies, in three blocks."""
    deduplicate_embeddings(
        features,
        out,
        against=[],
        similar=Similar(threshold=0.9, against=0.9, k=5),
        way=Way(20, torch.device("cpu"), approximate),
        progress=False,
    )


def test_ranks_share_the_blocks_and_a_failure_of_one_reaches_all(tmp_path: Path) -> None:
    """Two ranks take three blocks, so that one has none in the last turn."""
    rows = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)
    rows[40:] = rows[:20]
    save_picture(tmp_path / "images" / "00000.jpg", seed=0)
    for i in range(1, 60):  # only those on the page are read
        (tmp_path / "images" / f"{i:05d}.jpg").touch()
    spec = str(tmp_path / "images")
    good = write_features(tmp_path / "good", {"cls": rows}, spec=spec)
    found(good, tmp_path / "one" / "kept.txt")
    options = ClusterOptions(levels=(5,), iterations=5, resampling=(0,))
    clusters = tmp_path / "clusters"
    cluster(good, clusters, options)
    of_seeds(good, clusters, tmp_path / "one" / "seeds.txt")
    rows[59, 0] = np.nan
    bad = write_features(tmp_path / "bad", {"cls": rows}, spec=spec)
    said = run_distributed(
        "tests.distributed.test_curation_copies:of_rank",
        world_size=2,
        timeout_s=60,
        good=str(good),
        bad=str(bad),
        clusters=str(clusters),
        out=str(tmp_path / "two" / "kept.txt"),
    )
    for suffix in (".txt", ".json", ".jsonl", ".html"):
        one, two = (tmp_path / name / f"kept{suffix}" for name in ("one", "two"))
        # The JSON says where the list is.
        assert one.read_text() == two.read_text().replace("/two/", "/one/"), suffix
    lists = [(tmp_path / name / "seeds.txt").read_text() for name in ("one", "two")]
    assert lists[0] == lists[1] != ""
    assert len((tmp_path / "one" / "kept.txt").read_text().splitlines()) == 40
    assert all("00059.jpg (row 59) are not finite" in text for text in said)
