"""Folders of features as a selection reads them, and the lists that it writes."""

from __future__ import annotations

import hashlib
import json
import shlex
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.curation.embeddings import Embeddings, open_embeddings
from data_tools.curation.selection import write_selection
from data_tools.files import open_files
from dinoscale.data.sources.source import open_source
from dinoscale.errors import DataError
from tests.unit.data.conftest import jpeg
from tests.unit.data_tools.tiny_features import write_features

CLS = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float16)
PATCH = np.random.default_rng(1).normal(size=(23, 2)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    arrays = {"cls": CLS, "mean_patch": PATCH, "patches": np.zeros((23, 3, 2), np.float32)}
    return write_features(
        tmp_path / "features", arrays, labels=[i % 3 - 1 for i in range(23)], shard_size=5
    )


def test_rows_are_those_of_the_arrays_wherever_a_block_begins(folder: Path) -> None:
    both = open_embeddings(folder, features=("mean_patch", "cls"), normalize=False)
    whole = np.concatenate([PATCH, CLS.astype(np.float32)], axis=1)
    assert (len(both), both.width) == (23, 6)
    for start, stop in [(0, 23), (0, 5), (4, 16), (22, 23), (7, 7)]:
        assert np.array_equal(both.rows(start, stop), whole[start:stop])
    numbers = np.array([22, 3, 3, 10])
    assert np.array_equal(both.take(numbers), whole[numbers])
    assert both.names(numbers) == ["00022.jpg", "00003.jpg", "00003.jpg", "00010.jpg"]
    assert both.labels is not None
    assert both.labels.tolist() == [i % 3 - 1 for i in range(23)]


def test_rows_have_length_one_and_the_usual_feature_is_the_class_token(folder: Path) -> None:
    usual = open_embeddings(folder)
    assert usual.features == ("cls",)
    rows = usual.rows(0, 23)
    assert np.allclose(rows * np.linalg.norm(CLS.astype(float), axis=1)[:, None], CLS, atol=1e-5)
    assert np.array_equal(usual.rows(9, 11), rows[9:11])
    assert usual.digest != open_embeddings(folder, features=("mean_patch",)).digest
    assert usual.digest != open_embeddings(folder, normalize=False).digest


def test_a_folder_that_is_not_whole_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing is no folder of features.*dinoscale embed"):
        open_embeddings(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"'pooled' is not there; it has cls, mean_patch\."):
        open_embeddings(folder, features=("pooled",))
    with pytest.raises(DataError, match="'patches' has several rows for an image"):
        open_embeddings(folder, features=("patches",))
    array = folder / "cls-00002.npy"
    kept = array.read_bytes()
    array.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(DataError, match=r"cls-00002\.npy is damaged: its SHA-256"):
        open_embeddings(folder).verify()
    array.write_bytes(kept[:-2])
    with pytest.raises(DataError, match=r"cls-00002\.npy is missing or damaged"):
        open_embeddings(folder)
    array.write_bytes(kept)
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"manifest\.json is not as .* writes it"):
        open_embeddings(folder)
    manifest.unlink()
    (folder / "unfinished.json").write_text("{}")
    with pytest.raises(DataError, match=r"features is unfinished: start the same"):
        open_embeddings(folder)


def test_numbers_that_are_not_finite_are_refused_with_their_image(tmp_path: Path) -> None:
    rows = np.ones((9, 4), np.float32)
    rows[6, 1] = np.nan
    embeddings = open_embeddings(write_features(tmp_path / "out", {"cls": rows}, shard_size=4))
    embeddings.rows(0, 6)
    with pytest.raises(DataError, match=r"features of 00006\.jpg \(row 6\) are not finite"):
        embeddings.rows(3, 9)


def test_rows_of_any_size_have_length_one_and_zeros_are_refused_by_name(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(9, 5))
    sizes = np.array([1e-40, 1e-24, 1e-12, 1, 1, 1, 1e12, 1e20, 1e37])[:, None]
    scaled = (rows * sizes).astype(np.float32)
    found = open_embeddings(write_features(tmp_path / "out", {"cls": scaled})).rows(0, 9)
    exact = scaled / np.linalg.norm(scaled.astype(np.float64), axis=1, keepdims=True)
    assert np.abs(found - exact).max() < 4 * np.finfo(np.float32).eps
    scaled[6] = 0
    zeros = write_features(tmp_path / "zeros", {"cls": scaled})
    with pytest.raises(DataError, match=r"features of 00006\.jpg \(row 6\) are all zero"):
        open_embeddings(zeros).rows(3, 9)
    assert not open_embeddings(zeros, normalize=False).rows(6, 7).any()


def _of(tmp_path: Path, spec: Path, names: list[str], classes: list[str] | None) -> Embeddings:
    rows = np.ones((len(names), 2), np.float32)
    out = tmp_path / "features"
    return open_embeddings(
        write_features(out, {"cls": rows}, names=names, classes=classes, spec=str(spec))
    )


def test_a_selection_of_a_folder_is_a_list_for_training(tmp_path: Path) -> None:
    names = [f"{'xy'[i % 2]}/{i}.jpg" for i in range(6)]
    for name in names:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(int(path.stem)))
    embeddings = _of(tmp_path, tmp_path / "images", names, ["x", "y"])
    out = tmp_path / "chosen.txt"
    write_selection(
        out,
        embeddings,
        np.array([1, 3, 5]),
        counts=np.array([1, 2, 1]),
        about={"command": "test", "seed": 3},
    )
    trained = open_source(str(out))
    assert [Path(trained.path(i)).name for i in range(len(trained))] == [
        "1.jpg", "3.jpg", "3.jpg", "5.jpg",
    ]  # fmt: skip
    assert trained.picture(3).pixels().shape[2] == 3
    packed = open_files(str(out))
    assert packed.class_names == ["x", "y"]
    assert packed.labels is not None
    assert packed.labels.tolist() == [1, 1, 1, 1]
    record = json.loads((tmp_path / "chosen.json").read_text())
    assert (record["images"], record["lines"], record["seed"]) == (3, 4, 3)
    assert record["embeddings"]["digest"] == embeddings.digest
    assert record["train_on"] == f"data.train={out}"
    assert record["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    record = write_selection(tmp_path / "a b.txt", embeddings, np.array([1]), about={})
    assert shlex.split(record["train_on"]) == [f"data.train={tmp_path / 'a b.txt'}"]


def test_a_list_names_images_of_the_folder_that_was_embedded_wherever_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"cls": np.ones((3, 2), np.float32)}
    for place in ("then", "now"):
        (tmp_path / place / "images").mkdir(parents=True)
        for i in range(3):
            (tmp_path / place / "images" / f"{i:05d}.jpg").touch()
    monkeypatch.chdir(tmp_path / "now")
    then, both = tmp_path / "then" / "images", np.array([0, 2])
    known = open_embeddings(write_features(tmp_path / "known", rows, root=str(then)))
    write_selection(tmp_path / "a.txt", known, both, about={})
    assert (tmp_path / "a.txt").read_text() == f"{then}/00000.jpg\n{then}/00002.jpg\n"
    old = open_embeddings(write_features(tmp_path / "old", rows))  # as older versions wrote it
    with pytest.raises(DataError, match=r"known only as images, .* with --image-root"):
        write_selection(tmp_path / "b.txt", old, both, about={})
    write_selection(tmp_path / "b.txt", old, both, about={}, images="../then/images")
    assert (tmp_path / "b.txt").read_bytes() == (tmp_path / "a.txt").read_bytes()
    (then / "00001.jpg").unlink()
    with pytest.raises(DataError, match=r"00001\.jpg of .* is not in .*then/images"):
        write_selection(tmp_path / "c.txt", known, both, about={})


def test_a_selection_of_shards_is_a_list_to_pack(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for i in range(4):
            path = tmp_path / f"{i}.jpg"
            path.write_bytes(jpeg(i))
            tar.add(path, path.name)
    embeddings = _of(tmp_path, shard, [f"{shard}::{i}.jpg" for i in range(4)], None)
    out = tmp_path / "chosen.txt"
    record = write_selection(out, embeddings, np.array([1, 2]), about={})
    assert record["train_on"].startswith(f"dinoscale data build-shards {out} ")
    packed = open_files(str(out))  # as `build-shards` opens it
    assert [packed.data(i) for i in range(len(packed))] == [jpeg(1), jpeg(2)]


def test_images_that_no_list_can_name_are_refused(tmp_path: Path) -> None:
    embeddings = _of(tmp_path, Path("synthetic:shapes"), ["0", "1"], None)
    with pytest.raises(DataError, match="synthetic:shapes, are no files on a disk"):
        write_selection(tmp_path / "a.txt", embeddings, np.array([0]), about={})


def test_images_that_have_moved_are_named_by_their_new_folder(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "0.jpg").write_bytes(jpeg(0))
    embeddings = _of(tmp_path, tmp_path / "old", ["0.jpg"], None)
    with pytest.raises(DataError, match=r"0\.jpg of .* is not in .*old\. .*--image-root"):
        write_selection(tmp_path / "a.txt", embeddings, np.array([0]), about={})
    out, moved = tmp_path / "a.txt", str(tmp_path / "new")
    write_selection(out, embeddings, np.array([0]), about={}, images=moved)
    assert out.read_text() == f"{tmp_path}/new/0.jpg\n"


def test_labels_are_read_a_shard_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All records at once hold some 190 bytes an image; a set without labels is told by one."""
    rows, names = np.ones((1000, 1), np.float32), [f"n0144/n0144_{i:08d}.JPEG" for i in range(1000)]
    labelled, plain = tmp_path / "labelled", tmp_path / "plain"
    write_features(labelled, {"cls": rows}, names=names, labels=[*range(1000)], shard_size=50)
    write_features(plain, {"cls": rows[:10]}, shard_size=5)
    known, unknown = open_embeddings(labelled), open_embeddings(plain)
    tracemalloc.start()
    labels = known.labels
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert labels is not None
    assert labels.tolist() == [*range(1000)]
    assert peak < 60 * len(labels)
    read: list[int] = []
    record = Embeddings._record

    def recorded(embeddings: Embeddings, shard: int) -> dict[str, Any]:
        read.append(shard)
        return record(embeddings, shard)

    monkeypatch.setattr(Embeddings, "_record", recorded)
    assert unknown.labels is None
    assert read == [0]


def test_rows_asked_in_any_order_are_found_shard_by_shard(folder: Path) -> None:
    embeddings = open_embeddings(folder)
    numbers = np.random.default_rng(0).integers(0, len(embeddings), size=50)
    assert embeddings.names(numbers) == [embeddings.names(numbers[[i]])[0] for i in range(50)]
    assert embeddings.names(numbers[:0]) == []
    np.testing.assert_array_equal(
        embeddings.take(numbers), embeddings.rows(0, len(embeddings))[numbers]
    )
