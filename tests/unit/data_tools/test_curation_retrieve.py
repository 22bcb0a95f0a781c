"""Images like those of a seed set: nearest ones, or those of the seeds' clusters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_tools.curation.balance import BalanceOptions, balance
from data_tools.curation.clusters import open_clusters
from data_tools.curation.duplicates import deduplicate_embeddings
from data_tools.curation.groups import Similar
from data_tools.curation.hierarchy import ClusterOptions, cluster
from data_tools.curation.retrieve import (
    ByCluster,
    BySeed,
    Output,
    retrieve_clusters,
    retrieve_neighbours,
)
from data_tools.curation.search import Way
from dinoscale.errors import DataError, OutputError
from dinoscale.runtime import distributed
from tests.unit.data_tools.tiny_features import write_features
from tests.unit.evaluate.tiny_files import save_picture

CPU = torch.device("cpu")
SIZES = [60, 30, 8, 2]  # images of four far blobs


def _blobs(sizes: list[int], seed: int) -> NDArray[np.float32]:
    """Rows about the first four axes."""
    rng = np.random.default_rng(seed)
    which = np.repeat(np.arange(len(sizes)), sizes)
    return (4 * np.eye(8)[which] + 0.3 * rng.normal(size=(len(which), 8))).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in four blobs, and seeds: five in the first, six in the third, one in the fourth."""
    place = tmp_path_factory.mktemp("retrieve")
    save_picture(place / "images" / "00000.jpg", seed=0)
    for i in range(1, 100):  # only those on the page are read
        (place / "images" / f"{i:05d}.jpg").touch()
    write_features(place / "features", {"cls": _blobs(SIZES, 0)}, spec=str(place / "images"))
    write_features(place / "seeds", {"cls": _blobs([5, 0, 6, 1], 1)}, spec=str(place / "images"))
    options = ClusterOptions(levels=(4,), iterations=10, resampling=(0,))
    cluster(place / "features", place / "clusters", options)
    return place


def _numbers(out: Path) -> list[int]:
    return [int(Path(line).stem) for line in out.read_text().splitlines()]


def _near(place: Path, out: Path, *, block: int = 100, **options: Any) -> list[int]:
    by = BySeed(**{"k": 3, "at_least": -1.0, "images": None, **options})
    way = Way(block, CPU)
    retrieve_neighbours(
        place / "features", place / "seeds", Output(out), by, way=way, progress=False
    )
    return _numbers(out)


def _cosines() -> NDArray[np.float64]:
    """Of seeds and images, (12, 100)."""
    images, seeds = (
        rows / np.linalg.norm(rows, axis=1)[:, None]
        for rows in (
            _blobs(SIZES, 0).astype(np.float64),
            _blobs([5, 0, 6, 1], 1).astype(np.float64),
        )
    )
    cosines: NDArray[np.float64] = seeds @ images.T
    return cosines


def test_the_nearest_images_of_every_seed_are_chosen_once(place: Path, tmp_path: Path) -> None:
    order = np.argsort(-_cosines(), axis=1)
    whole = sorted({*order[:, :3].ravel().tolist()})
    assert _near(place, tmp_path / "near.txt") == whole
    assert _near(place, tmp_path / "blocks.txt", block=5) == whole
    record = json.loads((tmp_path / "near.json").read_text())
    assert record["numbers"] == {
        "images": 100,
        "seeds": 12,
        "seeds_without_images": 0,
        "neighbours": 36,
        "different": len(whole),
        "chosen": len(whole),
    }
    page = (tmp_path / "near.html").read_text()
    assert f"{len(whole)} of 100 images are chosen" in page
    assert "00000.jpg" in page


def test_a_limit_takes_first_neighbours_first_and_a_threshold_near_ones(
    place: Path, tmp_path: Path
) -> None:
    cosines = _cosines()
    order = np.argsort(-cosines, axis=1)
    nearest = order[:, 0].tolist()
    assert _near(place, tmp_path / "all.txt", images=len({*nearest})) == sorted({*nearest})
    best = sorted(range(12), key=lambda seed: -cosines[seed, nearest[seed]])[:2]
    assert _near(place, tmp_path / "two.txt", images=2) == sorted(nearest[s] for s in best)
    least = float(np.median(cosines[np.arange(12), nearest]))
    found = _near(place, tmp_path / "some.txt", at_least=least)
    near = np.take_along_axis(cosines, order, axis=1)[:, :3] >= least - 1e-6
    assert found == sorted({*order[:, :3][near].tolist()})
    with pytest.raises(DataError, match=r"no image has a seed as near as --threshold says"):
        _near(place, tmp_path / "none.txt", at_least=1.0)


def _of_clusters(place: Path, out: Path, **options: Any) -> list[int]:
    by = ByCluster(**{"min_seeds": 4, "per_cluster": 10, "images": None, "seed": 0, **options})
    retrieve_clusters(
        *(None, place / "seeds", place / "clusters", Output(out), by), device=CPU, progress=False
    )
    return _numbers(out)


def test_clusters_with_enough_seeds_give_images_up_to_the_cap(place: Path, tmp_path: Path) -> None:
    found = np.array(_of_clusters(place, tmp_path / "ten.txt"))
    assert (found < 60).sum() == 10  # of the first blob
    assert found[found >= 60].tolist() == [*range(90, 98)]  # all of the third one
    assert _of_clusters(place, tmp_path / "again.txt") == found.tolist()
    other = _of_clusters(place, tmp_path / "other.txt", seed=1)
    assert len(other) == 18
    assert other != found.tolist()
    few = _of_clusters(place, tmp_path / "few.txt", images=7)
    assert len(few) == 7
    assert {*few} < {*found.tolist()}
    one = _of_clusters(place, tmp_path / "one.txt", min_seeds=1, per_cluster=1000)
    assert one == [*range(60), *range(90, 100)]  # nothing of the second blob, without seeds
    with pytest.raises(DataError, match=r"--min-seeds 7: no cluster has so many, the most are 6"):
        _of_clusters(place, tmp_path / "none.txt", min_seeds=7)


def test_arrays_that_have_changed_since_they_were_written_are_refused(
    place: Path, tmp_path: Path
) -> None:
    def flip(folder: str, name: str) -> None:
        path = moved / folder / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    moved, out = tmp_path / "place", tmp_path / "near.txt"
    shutil.copytree(place, moved)
    for folder, name in (("features", "cls-00001.npy"), ("seeds", "cls-00000.npy")):
        flip(folder, name)
        with pytest.raises(DataError, match=rf"{folder}/{name} is damaged: its SHA-256"):
            _near(moved, out)
        if folder == "seeds":
            with pytest.raises(DataError, match=rf"{folder}/{name} is damaged: its SHA-256"):
                _of_clusters(moved, out)
        flip(folder, name)
    for name in ("assignments", "distances"):
        flip("clusters", f"{name}-1.npy")
        with pytest.raises(DataError, match=rf"{name}-1\.npy is damaged: its SHA-256"):
            open_clusters(moved / "clusters").level(1)
        flip("clusters", f"{name}-1.npy")
    assert len(_of_clusters(moved, out)) == 18


def test_the_list_that_named_images_or_seeds_is_not_overwritten(
    place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "list.txt"
    _near(place, out)
    read, lines = out.read_bytes(), out.read_text().splitlines()
    rows = _blobs([len(lines)], 2)
    of_list = write_features(tmp_path / "of list", {"cls": rows}, names=lines, spec=str(out))
    others = place / "features"
    for images, seeds in ((of_list, others), (others, of_list)):
        with pytest.raises(OutputError, match=r"list\.txt is the input: choose another name"):
            retrieve_neighbours(images, seeds, Output(out), BySeed(1, -1.0, None), way=Way(9, CPU))
    for images, tests in ((of_list, []), (others, [of_list])):
        with pytest.raises(OutputError, match=r"list\.txt is the input: choose another name"):
            deduplicate_embeddings(
                images, out, against=tests, similar=Similar(0.9, 0.9, 3), way=Way(9, CPU)
            )
    cluster(of_list, tmp_path / "clusters", ClusterOptions(levels=(2,), resampling=(0,)))
    with pytest.raises(OutputError, match=r"list\.txt is the input: choose another name"):
        balance(tmp_path / "clusters", out, BalanceOptions(2))
    assert out.read_bytes() == read


def test_folders_are_opened_where_the_error_of_a_rank_reaches_all(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, caught = distributed.together, []

    def recorded(work: Callable[[], Any]) -> Any:
        try:
            return together(work)
        except DataError as error:
            caught.append(str(error))
            raise

    monkeypatch.setattr(distributed, "together", recorded)
    out, gone, way = Output(tmp_path / "near.txt"), tmp_path / "gone", Way(9, CPU)
    by_cluster = ByCluster(min_seeds=4, per_cluster=10, images=None, seed=0)
    calls: list[Callable[[], object]] = [
        lambda: retrieve_neighbours(gone, gone, out, BySeed(1, -1.0, None), way=way),
        lambda: retrieve_clusters(None, gone, place / "clusters", out, by_cluster, device=CPU),
        lambda: deduplicate_embeddings(
            gone, out.path, against=[], similar=Similar(0.9, 0.9, 3), way=way
        ),
    ]
    for number, call in enumerate(calls, 1):
        with pytest.raises(DataError, match=r"gone is no folder of features"):
            call()
        assert len(caught) == number


def test_options_out_of_range_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"need --neighbours >= 1"):
        BySeed(k=0, at_least=0.0, images=None)
    with pytest.raises(DataError, match=r"--images 0: need at least one"):
        BySeed(k=1, at_least=0.0, images=0)
    with pytest.raises(DataError, match=r"--block 0: need at least one"):
        _near(place, tmp_path / "near.txt", block=0)
    with pytest.raises(DataError, match=r"near.csv: data.train takes a list by its ending"):
        _near(place, tmp_path / "near.csv")
