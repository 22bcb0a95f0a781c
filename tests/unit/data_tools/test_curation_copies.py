"""Copies by embeddings: what was planted is found, and nothing else is left out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_tools.curation import search
from data_tools.curation.duplicates import deduplicate_embeddings, groups_of
from data_tools.curation.groups import Similar
from data_tools.curation.search import Way
from dinoscale import cli
from dinoscale.errors import DataError
from tests.unit.data_tools.tiny_features import write_features
from tests.unit.evaluate.tiny_files import save_picture, save_weights

WIDTH = 32
SIMILAR = Similar(threshold=0.95, against=0.95, k=10)


def _way(block: int = 1000, *, approximate: bool = False) -> Way:
    return Way(block, torch.device("cpu"), approximate)


def _different(number: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows of which no two have a cosine of 0.9: of 32 random numbers, it stays below 0.8."""
    return np.random.default_rng(seed).normal(size=(number, WIDTH)).astype(np.float32)


def _turned(row: NDArray[np.float32], cosine: float, seed: int, times: int = 1) -> NDArray[Any]:
    """A row turned so many times by the angle of this cosine, always in the same plane."""
    one = row / np.linalg.norm(row)
    other = _different(1, seed)[0]
    other -= (other @ one) * one
    angle = times * np.arccos(cosine)
    return np.cos(angle) * one + np.sin(angle) * other / np.linalg.norm(other)


def _planted() -> NDArray[np.float32]:
    """200 different rows, then copies: see `GROUPS`."""
    rows = _different(200)
    copies = [2 * rows[0], rows[0], _turned(rows[1], 0.97, seed=50), _turned(rows[2], 0.94, 51)]
    chain = [_turned(rows[3], 0.96, seed=52, times=link) for link in range(1, 5)]
    return np.concatenate([rows, [*copies, *chain]]).astype(np.float32)


# Rows 200 and 201 are row 0, 202 is near row 1, 203 not near enough to row 2, and from row 3 a
# chain of near ones leads to 207, which is far from row 3.
GROUPS = [[0, 200, 201], [1, 202], [3, 204, 205, 206, 207]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("copies") / "images"
    for i in range(208):  # only those on the page are read
        place.mkdir(exist_ok=True)
        (place / f"{i:05d}.jpg").write_bytes(b"")
    for i in (0, 1, 3, 200, 201, 202, 204):
        save_picture(place / f"{i:05d}.jpg", seed=i)
    return place


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    out = tmp_path_factory.mktemp("features") / "features"
    labels = [i % 4 for i in range(208)]
    return write_features(out, {"cls": _planted()}, labels=labels, spec=str(images), shard_size=64)


def _numbers(out: Path) -> list[int]:
    return [int(Path(line).stem) for line in out.read_text().splitlines()]


def _files(out: Path) -> dict[str, bytes]:
    names = [out, *(out.with_suffix(end) for end in (".json", ".jsonl", ".html"))]
    here = str(out.parent).encode()  # the JSON says where the list is
    return {path.suffix: path.read_bytes().replace(here, b"") for path in names}


def _run(
    features: Path, out: Path, *, way: Way | None = None, against: tuple[Path, ...] = ()
) -> dict[str, Any]:
    return deduplicate_embeddings(
        features, out, against=against, similar=SIMILAR, way=way or _way(), progress=False
    )


@pytest.fixture(scope="module")
def whole(features: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole") / "kept.txt"
    return out, _run(features, out)


def test_planted_copies_are_left_out_and_nothing_else(whole: tuple[Path, dict[str, Any]]) -> None:
    out, summary = whole
    gone = {row for group in GROUPS for row in group[1:]}
    assert _numbers(out) == [row for row in range(208) if row not in gone]
    assert (summary["groups"], summary["copies"], summary["kept"]) == (3, 7, 201)
    assert summary["largest_group"] == 5
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    found = [
        [int(line["keep"][:5]), *(int(copy["path"][:5]) for copy in line["duplicates"])]
        for line in lines
    ]
    assert found == GROUPS
    assert [copy["cosine"] for copy in lines[0]["duplicates"]] == [1.0, 1.0]
    assert lines[1]["duplicates"][0]["cosine"] == pytest.approx(0.97, abs=1e-5)


def test_the_page_shows_pictures_of_copies_and_says_the_numbers(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    page = whole[0].with_suffix(".html").read_text()
    assert "201 of 208 images are kept" in page
    assert page.count("data:image/jpeg") >= 7
    assert "00206.jpg left out, 0.960" in page
    assert "(no picture) 00206.jpg" in page  # its file is empty
    assert "as even as so many of one size" in page
    assert not list(whole[0].parent.glob("*.state"))


@pytest.mark.parametrize(("threshold", "aloud"), [(0.4, True), (0.95, False)])
def test_a_group_of_much_of_the_set_is_said_aloud(
    features: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    threshold: float,
    aloud: bool,
) -> None:
    similar = Similar(threshold=threshold, against=0.95, k=10)
    summary = deduplicate_embeddings(
        features, tmp_path / "a.txt", against=(), similar=similar, way=_way(), progress=False
    )
    large = summary["largest_group"]
    assert (large > 50) is aloud
    said = f"one group of copies has {large} of all 208 images"
    assert (said in caplog.text) is aloud
    assert ("take a larger --threshold" in caplog.text) is aloud


@pytest.mark.parametrize("block", [50, 207])
def test_other_blocks_give_the_same_files(
    features: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path, block: int
) -> None:
    _run(features, tmp_path / "kept.txt", way=_way(block))
    assert _files(tmp_path / "kept.txt") == _files(whole[0])


def test_killed_and_resumed_gives_the_same_files(
    features: Path,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, nearest, searched = tmp_path / "kept.txt", search.nearest, []

    def killed_at_third(*arguments: Any, **options: Any) -> Any:
        searched.append(arguments[2])
        if len(searched) == 3:
            raise KeyboardInterrupt
        return nearest(*arguments, **options)

    monkeypatch.setattr(search, "nearest", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        _run(features, out, way=_way(50))
    assert not out.exists()
    _run(features, out, way=_way(50))
    assert [span.start for span in searched] == [0, 50, 100, 100, 150, 200]
    assert _files(out) == _files(whole[0])


def test_of_a_group_the_picture_with_most_pixels_is_kept(tmp_path: Path, images: Path) -> None:
    rows = np.repeat(_different(2), 3, axis=0)
    folder = write_features(
        tmp_path / "features",
        {"cls": rows},
        spec=str(images),
        sizes=[[40, 40], [50, 40], [45, 45], [40, 40], [30, 90], [90, 30]],
    )
    _run(folder, tmp_path / "kept.txt")
    assert _numbers(tmp_path / "kept.txt") == [2, 4]


def test_images_near_a_test_image_and_their_groups_are_left_out(
    features: Path, tmp_path: Path
) -> None:
    rows = _planted()
    one = write_features(
        tmp_path / "one", {"cls": np.stack([_turned(rows[9], 0.96, 60), _different(1, 61)[0]])}
    )
    two = write_features(tmp_path / "two", {"cls": rows[[206, 9]] * 3})
    out = tmp_path / "kept.txt"
    summary = _run(features, out, against=(one, two))
    # 205 and 207 are near 206, the test image, too; 3 and 204 are joined to these.
    gone = {200, 201, 202, 3, 204, 205, 206, 207, 9}
    assert _numbers(out) == [row for row in range(208) if row not in gone]
    assert summary["similar_to_tests"] == {str(one): 1, str(two): 4}
    assert (summary["similar_to_a_test"], summary["in_a_group_with_these"]) == (4, 2)
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line.get("of") == str(one)]
    assert (line["path"], line["test"]) == ("00009.jpg", "00000.jpg")
    assert [line["path"][:5] for line in lines if "because" in line] == ["00003", "00204"]


def test_embeddings_that_cannot_be_used_are_refused_by_name(
    features: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "kept.txt"
    with pytest.raises(DataError, match=r"nothing is no folder of features"):
        _run(tmp_path / "nothing", out)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "unfinished.json").write_text("{}")
    with pytest.raises(DataError, match=r"begun is unfinished"):
        _run(features, out, against=(tmp_path / "begun",))
    wide = write_features(tmp_path / "wide", {"cls": np.ones((3, 7), np.float32)})
    with pytest.raises(DataError, match=r"wide cannot be compared.*width.*7 and 32"):
        _run(features, out, against=(wide,))
    broken = _different(3)
    broken[2, 0] = np.inf
    folder = write_features(tmp_path / "broken", {"cls": broken}, spec=str(images))
    with pytest.raises(DataError, match=r"broken: the features of 00002.jpg .*not finite"):
        _run(folder, out)
    with pytest.raises(DataError, match=r"--threshold 1.5: need a cosine"):
        Similar(threshold=1.5, against=0.9, k=3)
    with pytest.raises(DataError, match=r"every image is similar to a test image"):
        _run(features, tmp_path / "none.txt", against=(features,))


@pytest.mark.parametrize("which", ["features", "test"])
def test_arrays_that_have_changed_since_they_were_written_are_refused(
    images: Path, tmp_path: Path, which: str
) -> None:
    for name in ("features", "test"):
        write_features(tmp_path / name, {"cls": _different(3)}, spec=str(images))
    array = tmp_path / which / "cls-00000.npy"
    data = array.read_bytes()
    array.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{which}/cls-00000\.npy is damaged: its SHA-256"):
        _run(tmp_path / "features", tmp_path / "kept.txt", against=(tmp_path / "test",))


def test_a_name_that_no_list_can_hold_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a.jpg", "b\nc.jpg", "d.jpg"]
    for name in names:
        (tmp_path / name).touch()
    folder = write_features(
        tmp_path / "features", {"cls": _different(3)}, names=names, spec=str(tmp_path)
    )
    monkeypatch.setattr(search, "nearest", None)  # an error if it is called
    with pytest.raises(DataError, match=r"b.nc\.jpg' has a line break in its name"):
        _run(folder, tmp_path / "kept.txt")


def test_faiss_finds_the_planted_copies_too(
    features: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("faiss")
    _run(features, tmp_path / "kept.txt", way=_way(approximate=True))
    assert _numbers(tmp_path / "kept.txt") == _numbers(whole[0])


class _Empty:
    """Lists in which nothing is found."""

    def __init__(self, _: object) -> None: ...

    def candidates(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        return np.full((len(queries), k), -1)


def test_test_sets_are_searched_whole_where_the_set_is_not(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what faiss has found is kept for the same version only."""
    monkeypatch.setattr(search, "InvertedLists", _Empty)
    monkeypatch.setattr(search, "require_faiss", lambda: SimpleNamespace(__version__="1.0"))
    test = write_features(tmp_path / "test", {"cls": _planted()[:2]})
    summary = _run(features, tmp_path / "kept.txt", against=(test,), way=_way(approximate=True))
    assert summary["copies"] == 0
    assert summary["similar_to_a_test"] >= 2
    before = search.settings_of(_way(approximate=True))
    monkeypatch.setattr(search, "require_faiss", lambda: SimpleNamespace(__version__="2.0"))
    assert search.settings_of(_way(approximate=True)) != before
    assert search.settings_of(_way())["faiss"] is None


def test_the_commands_embed_deduplicate_and_retrieve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save_weights(tmp_path / "weights.safetensors")
    for name, seed in [("x/a", 0), ("x/b", 1), ("y/c", 0), ("y/d", 2)]:
        save_picture(tmp_path / "images" / f"{name}.png", seed=seed)
    save_picture(tmp_path / "test" / "e.png", seed=2)
    images, test = (str(tmp_path / f"of {name}") for name in ("images", "test"))
    cli.run(["embed", str(weights), str(tmp_path / "images"), images, "--num-workers", "0"])
    cli.run(["embed", str(weights), str(tmp_path / "test"), test, "--num-workers", "0"])
    kept, near = tmp_path / "kept.txt", tmp_path / "near.txt"
    command = ["data", "deduplicate-embeddings", images, str(kept), "--threshold", "0.99999"]
    cli.run([*command, "--against", test])
    assert [Path(line).name for line in kept.read_text().splitlines()] == ["a.png", "b.png"]
    assert groups_of(kept).exists()
    command = ["data", "retrieve", images, str(near), "--seeds", test]
    cli.run([*command, "--neighbours", "1"])
    assert near.read_text() == f"{tmp_path}/images/./y/d.png\n"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["chosen"] == 1
    assert near.with_suffix(".html").read_text().count("data:image/jpeg") == 2
    with pytest.raises(DataError, match=r"--min-seeds means nothing without --clusters"):
        cli.run([*command, "--min-seeds", "1"])
