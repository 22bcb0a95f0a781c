"""The comparison: shared columns, failed tasks, and a page that no name can break."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dinoscale import cli
from dinoscale.errors import ConfigError, DataError, LaunchError
from dinoscale.reports.comparison.page import write_page
from dinoscale.reports.comparison.plots import draw_column
from dinoscale.reports.comparison.runs import result_path
from dinoscale.reports.comparison.scores import Outcome, compare, outcome_of_report
from tests.unit.evaluate.conftest import Colors

BACKBONE = {"name": "vit_tiny_patch16_224", "patch_size": 8}


def _report(weights: str, *scores: float, **more: Any) -> dict[str, Any]:
    return {
        "task": "knn",
        "weights": weights,
        "weights_source": "a run",
        "backbone": BACKBONE,
        "test": {"spec": "val", "images": 9},
        "protocol": {"crop": 224, "temp": 0.07, "images": {"mean": [0.5], "resize": 256}},
        "score": {f"top1_k{10 * (i + 1)}": score for i, score in enumerate(scores)},
    } | more


def _outcome(report: dict[str, Any], *, origin: str = "a.json") -> Outcome:
    network = report["protocol"].get("network", "teacher")
    return Outcome(report["weights"], network, report["task"], origin, report)


def _changed(report: dict[str, Any], **protocol: object) -> dict[str, Any]:
    return report | {"protocol": report["protocol"] | protocol}


def _save(path: Path, report: object) -> Path:
    path.write_text(json.dumps(report))
    return path


def test_equal_protocols_share_a_column_and_the_highest_headline_is_best() -> None:
    other = _changed(_report("b/w.pth", 60.0), images={"mean": [0.1], "resize": 256}, patch=16)
    table = compare([_outcome(_report("a/w.pth", 50.0)), _outcome(other)])
    assert [row.label for row in table.rows] == ["a/w.pth", "b/w.pth"]
    assert [column.differs for column in table.columns] == [{}]
    assert table.best(0) == 60.0


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (_changed(_report("b", 60.0), crop=32), {"crop": 32}),
        (_changed(_report("b", 60.0), images={"resize": 64}), {"images.resize": 64}),
        (_report("b", 60.0, test={"spec": "val", "images": 8}), {"test.images": 8}),
        (_changed(_report("b", 60.0), whitening=True), {"whitening": True}),
        (_report("b", 60.0, sequences=[{"sequence": "cat", "score": {}}]), {"sequences": ["cat"]}),
    ],
)
def test_other_protocols_and_data_are_other_columns_that_name_the_difference(
    other: dict[str, Any], differs: dict[str, object]
) -> None:
    table = compare([_outcome(_report("a", 50.0)), _outcome(other)])
    assert table.columns[1].differs == differs
    assert [list(row.cells) for row in table.rows] == [[0], [1]]
    assert table.best(0) is table.best(1) is None  # nothing beside them


def test_weights_are_ranked_in_each_column_and_equal_ones_share_their_places(
    tmp_path: Path,
) -> None:
    scores = {"a": (50.0, 7.0), "b": (60.0, 9.0), "c": (60.0, 8.0), "d": (40.0, None)}
    beside = {"untrained": {"top1_k10": 99.0}}
    reports = [_report(name, first, **beside) for name, (first, _) in scores.items()]
    reports += [_report(n, x, task="video") for n, (_, x) in scores.items() if x is not None]
    reports += [_report(name, 5.0, task="rank") for name in scores]  # whose number is no quality
    reports += [_report("a", 5.0, task="copies")]  # nothing beside it
    table = compare([_outcome(report) for report in reports])
    found = table.as_json()
    ranks = [column["ranks"] for column in found["columns"]]  # type: ignore[attr-defined]  # nested report
    assert ranks == [{"a": 3, "b": 1.5, "c": 1.5, "d": 4}, {"a": 3, "b": 1, "c": 2}, {}, {}]
    assert (found["mean_ranks"], found["mean_ranks_of_columns"]) == (ranks[0], 1)
    whole = compare([_outcome(report) for report in reports if report["weights"] != "d"])
    assert whole.mean_ranks() == ({"a": 3, "b": 1.25, "c": 1.75}, 2)
    write_page(whole, tmp_path)
    page = (tmp_path / "compare.html").read_text()
    assert "Rank of the weights by task" in page
    assert "mean of 2" in page
    assert "<td>1.25</td>" in page


def test_networks_and_sources_of_equal_names_are_other_rows() -> None:
    student = _changed(_report("w.pth", 40.0), network="student")
    table = compare(
        [
            _outcome(report)
            for report in (
                _report("w.pth", 50.0),
                student,
                _report("w.pth", 60.0, weights_source="x"),
            )
        ]
    )
    assert [row.label for row in table.rows] == ["w.pth", "w.pth (student)", "w.pth #2"]


def _made_from(**files: int) -> dict[str, Any]:
    """Of a report; a number stands for the files of an input."""
    inputs = {name: {"root": "r", "number": 9, "times": files[name]} for name in files}
    return {"input": inputs, "command": {}, "code": {"dinoscale": "5f"}}


@pytest.mark.parametrize(
    ("other", "cells"),
    [
        (_made_from(weights=1, test=2), [[0], [0]]),
        (_made_from(weights=1, test=2, probe=4), [[0], [0]]),
        (_made_from(weights=0, test=3), [[0, 1]]),
        (_made_from(weights=0, test=2) | {"code": {"dinoscale": "60"}}, [[0, 1]]),
        (None, [[0], [1]]),
    ],
)
def test_equal_paths_with_different_files_share_neither_row_nor_column(
    other: dict[str, Any] | None, cells: list[list[int]]
) -> None:
    reports = [
        _report("w", score, made_from=made_from)
        for score, made_from in ((50.0, _made_from(weights=0, test=2)), (60.0, other))
    ]
    table = compare([_outcome(report) for report in reports])
    assert [list(row.cells) for row in table.rows] == cells


def test_two_numbers_for_one_cell_are_refused() -> None:
    same = [_outcome(_report("w", 50.0)), _outcome(_report("w", 50.0))]
    assert len(compare(same).rows) == 1
    with pytest.raises(
        ConfigError, match=r"c\.json: another report has different numbers of knn for w"
    ):
        compare([*same, _outcome(_report("w", 51.0), origin="c.json")])


def test_baselines_are_rows_and_a_range_where_reports_disagree() -> None:
    beside = {"untrained": {"top1_k10": 30.0}, "floors": {"top1_k10": 50.0}}
    reports = [_report("a", 50.0, **beside), _report("b", 60.0, **beside)]
    table = compare([_outcome(report) for report in reports])
    untrained, baseline = table.rows[2:]
    assert (untrained.label, baseline.label) == ("untrained vit_tiny_patch16_224", "baseline")
    assert [row.cells[0].not_above_baselines for row in table.rows[:2]] == [True, False]
    assert baseline.cells[0].headlines == [50.0]
    reports[1]["floors"] = {"top1_k10": 40.0}
    assert compare([_outcome(r) for r in reports]).rows[3].cells[0].headlines == [50.0, 40.0]


def test_untrained_networks_of_two_architectures_are_two_rows() -> None:
    small, large = ({"backbone": BACKBONE | {"depth": depth}} for depth in (1, 2))
    beside = {"untrained": {"top1_k10": 30.0}}
    reports = [_report("a", 50.0, **beside, **small), _report("b", 60.0, **beside, **large)]
    labels = [row.label for row in compare([_outcome(r) for r in reports]).rows[2:]]
    assert len(labels) == 2
    assert all(f"depth {depth}" in label for depth, label in enumerate(labels, start=1))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "need an object"),
        ("{", "is not the JSON of one report"),
        ("[" * 10**5, "is not the JSON of one report"),
        (json.dumps(_report("w", 1.0) | {"weights": 3}), "`weights` is no text"),
        (json.dumps(_report("w", float("nan"))), "`score` is no object of numbers"),
        (json.dumps(_report("w", 1.0, floors={"top1": "9"})), "`floors` is no object of numbers"),
        (json.dumps(_report("w", 1.0, sequences=[{"score": {}}])), "`sequences` is no list"),
        (json.dumps(_report("w", 1.0, made_from={"input": []})), "`made_from` is no fingerprint"),
        (json.dumps({"task": "compare", "columns": []}), "`weights` is no text"),
    ],
)
def test_files_that_are_no_report_are_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(says)):
        outcome_of_report(tmp_path / "r.json")


class _Seen(HTMLParser):
    """Tags, addresses and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.addresses, self.texts = set[str](), list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_names_never_become_markup_and_the_page_fetches_nothing(tmp_path: Path) -> None:
    evil = "_<script>alert('$x$')<\\script>\x01\udcff&amp;\u72ac.pth"
    Image.new("RGB", (3000, 20)).save(tmp_path / "sheet.png")
    report = _report(evil, 50.0, 60.0, picture=str(tmp_path / "sheet.png"))
    failure = Outcome(evil, "teacher", "pca", "pca <b>", None, "cannot read <img src=x>")
    write_page(compare([_outcome(report), failure]), tmp_path / "out")
    text = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    page = _Seen()
    page.feed(text)
    assert not page.tags & {"script", "b", "link", "iframe", "object"}
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert len(page.addresses) == 3  # bars, over k, the sheet
    assert "http" not in re.sub(r"data:[^\"]*|http-equiv", "", text)
    assert evil.replace("\x01\udcff", "\ufffd\ufffd") in page.texts
    assert "failed: cannot read <img src=x>" in page.texts
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["failed"] == 1


def test_videos_are_drawn_by_sequence_and_other_scores_by_part() -> None:
    sequences = [{"sequence": name, "score": {"J&F": 50.0}} for name in ("_car", "cat")]
    video = _report("w", 50.0, task="video", sequences=sequences)
    copies = _report("w", 50.0, 60.0, 70.0, task="copies")
    drawn = _report("w", task="attention", score=None)
    table = compare([_outcome(report) for report in (video, copies, drawn)])
    captions = [[plot.caption for plot in draw_column(table, number)] for number in range(3)]
    assert captions[0] == ["video: top1_k10, %", "video: by sequence, J&F, %"]
    assert captions[1] == ["copies: top1_k10, %", "copies: all numbers, %"]
    assert captions[2] == []


def test_a_result_belongs_to_options_and_weights(tmp_path: Path) -> None:
    weights = tmp_path / "run"
    weights.mkdir()
    (weights / "x").write_bytes(b"1")
    first = result_path(tmp_path, str(weights), ["knn", "--k", "20"])
    assert first == result_path(tmp_path, str(weights), ["knn", "--k", "20"])
    assert first != result_path(tmp_path, str(weights), ["knn", "--k", "10"])
    (weights / "x").write_bytes(b"12")
    assert first != result_path(tmp_path, str(weights), ["knn", "--k", "20"])


def _compare(*arguments: object) -> None:
    cli.run(["evaluate", "compare", *map(str, arguments)])


def test_a_failed_task_is_shown_as_an_error_and_only_it_runs_again(
    colors: Colors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(colors.weights.read_bytes())
    late = tmp_path / "late"
    sets = f"--test {colors.test} --num-workers 0 --k 3"
    knn = f"knn --train {colors.train} {sets}"
    line = (colors.weights, other, "--out", tmp_path / "out", "--task", knn, "--task")
    with pytest.raises(SystemExit, match="2"):
        _compare(*line, f"knn --train {late} {sets}")
    first = json.loads(capsys.readouterr().out)
    assert first["failed"] == 2
    for row in first["rows"]:
        good, bad = row["cells"]
        assert good["score"]["top1_k3"] > 0
        assert str(late) in bad["error"]
    assert "failed: " in (tmp_path / "out" / "compare.html").read_text()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "results").glob("*.json")}
    assert len(kept) == 2
    (late).symlink_to(colors.train)
    _compare(*line, f"knn --train {late} {sets}")
    second = json.loads(capsys.readouterr().out)
    assert second["failed"] == 0
    assert [column["differs"]["train.spec"] for column in second["columns"]] == [
        colors.train,
        str(late),
    ]
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in kept}.items()
    reports = sorted((tmp_path / "out" / "results").glob("*.json"))
    assert len(reports) == 4
    _compare(*reports, "--out", tmp_path / "again")
    cells = [row["cells"] for row in json.loads(capsys.readouterr().out)["rows"]]
    assert all(cell["score"] for row in cells for cell in row)


def test_other_images_of_the_same_names_are_measured_again(
    colors: Colors,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    test = Path(colors.folder("replaced", {"blue": 2, "red": 2}))
    task = f"knn --train {colors.train} --test {test} --k 3 --num-workers 0"
    line = (colors.weights, "--out", tmp_path / "out", "--task", task)
    _compare(*line)
    first = json.loads(capsys.readouterr().out)
    with caplog.at_level("INFO"):
        _compare(*line)
    assert "already measured, see" in caplog.text
    assert json.loads(capsys.readouterr().out) == first
    for blue, red in zip(
        *(sorted((test / name).iterdir()) for name in ("blue", "red")), strict=True
    ):
        pixels = blue.read_bytes(), red.read_bytes()
        blue.write_bytes(pixels[1])
        red.write_bytes(pixels[0])
    _compare(*line)
    assert "measuring again, these changed: input.test." in caplog.text
    again = json.loads(capsys.readouterr().out)
    assert again["rows"][0]["cells"] != first["rows"][0]["cells"]


def test_pictures_of_each_weights_are_its_own(
    colors: Colors,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DINOSCALE_CACHE", str(cache))
    other = tmp_path / "other.safetensors"
    other.write_bytes(colors.weights.read_bytes())
    task = f"correspond --images {colors.test} --warp --size 32 --limit 1"
    _compare(colors.weights, other, "--out", tmp_path / "out", "--task", task)
    capsys.readouterr()
    assert len(list((tmp_path / "out" / "results").glob("*/correspond-sheet.png"))) == 2
    page = _Seen()
    page.feed((tmp_path / "out" / "compare.html").read_text())
    drawn = [address for address in page.addresses if address.startswith("data:image/png")]
    assert len(drawn) == 2  # the plot is an SVG
    assert not list(cache.glob("finished-*"))  # of results that are reported


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("knn --train x", "required: --test"),
        ("knn --train x --test y --kk 3", "unrecognized arguments: --kk 3"),
        ("segment x --out y", "--out: compare chooses the place"),
        ("knn x --predictions=y.csv", "--predictions: compare chooses the place"),
        ("segmentation --data x --pictures y", "--pictures: compare chooses the place"),
        ("compare x", "invalid choice: 'compare'"),
        ("pca 'x", "No closing quotation"),
    ],
)
def test_a_wrong_line_is_refused_before_anything_runs(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(ConfigError, match="--task") as error:
        _compare("w", "--out", tmp_path, "--task", "knn --train x --test y", "--task", line)
    assert says in str(error.value)
    assert not list(tmp_path.iterdir())


def test_weights_need_tasks_and_tasks_need_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compare: no --task LINE to measure"):
        _compare("w.pth", "--out", tmp_path)
    report = _save(tmp_path / "r.json", _report("w", 1.0))
    with pytest.raises(ConfigError, match="no WEIGHTS"):
        _compare(report, "--out", tmp_path, "--task", "pca x")


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="compare runs in one process, not in 2"):
        _compare(_save(tmp_path / "r.json", _report("w", 1.0)), "--out", tmp_path)
