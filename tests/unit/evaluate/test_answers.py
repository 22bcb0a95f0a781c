"""Answers for single images: by class, in files, with intervals, and compared in pairs."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoscale.errors import ConfigError, DataError, OutputError
from dinoscale.evaluate.classification.answers import Details, intervals
from dinoscale.evaluate.classification.finetune import Recipe, evaluate_finetune
from dinoscale.evaluate.classification.knn import evaluate_knn
from dinoscale.evaluate.classification.linear import evaluate_linear
from dinoscale.evaluate.classification.linear_protocols import DinoProtocol, GridProtocol
from dinoscale.evaluate.classification.logistic import evaluate_logistic
from dinoscale.evaluate.classification.paired import holm, mcnemar
from dinoscale.evaluate.classification.resumable_training import Best
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.evaluate.predictions import digest_of_file, read_correct
from dinoscale.reports.comparison.page import write_page
from dinoscale.reports.comparison.runs import Job, _saved
from dinoscale.reports.comparison.scores import Outcome, compare
from tests.unit.evaluate.conftest import Colors

OPTIONS = ExtractionOptions(num_workers=0, device="cpu", progress=False)
DINO = DinoProtocol(epochs=4, batch_size=24, lr=1.0)
MEASURES: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "knn": (evaluate_knn, {"ks": (3, 20)}),
    "logistic": (evaluate_logistic, {"cs": (1.0, 100.0)}),
    "grid": (
        evaluate_linear,
        {"protocol": GridProtocol(iterations=4, batch_size=16), "augment": False},
    ),
    "dino": (evaluate_linear, {"protocol": DINO, "augment": False}),
    "finetune": (evaluate_finetune, {"recipe": Recipe(epochs=2, batch_size=24, lr=1e-3)}),
}


def _run(task: str, colors: Colors, *, test: str | None = None, **details: Any) -> dict[str, Any]:
    evaluate, settings = MEASURES[task]
    sets = (colors.hard[0], test or colors.hard[1])
    how = {**settings, "details": Details(**details), "options": OPTIONS}
    return evaluate(colors.weights, *sets, **how)


@pytest.mark.parametrize("task", MEASURES)
def test_the_answers_in_a_file_are_those_of_the_score(
    task: str, colors: Colors, tmp_path: Path
) -> None:
    report = _run(task, colors, per_class=True, predictions=tmp_path / "answers.csv")
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    with (tmp_path / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["image"] for row in rows)[:2] == ["blue/0.png", "blue/1.png"]
    assert all(row["image"].split("/")[0] == row["class"] for row in rows)
    assert all((row["class"] == row["answer"]) == (row["correct"] == "1") for row in rows)
    top1 = next(iter(report["score"].values()))
    right = [row["correct"] == "1" for row in rows]
    assert 100 * sum(right) / len(right) == pytest.approx(top1, abs=1e-9)
    assert 34 < top1 < 100  # neither chance nor all
    low, high = next(iter(report["intervals"].values()))
    assert low < top1 < high
    matrix, names = report["confusion"]["matrix"], report["confusion"]["classes"]
    for name, of_class, line in zip(names, report["per_class"], matrix, strict=True):
        given = [row["answer"] for row in rows if row["class"] == name]
        assert (of_class["class"], of_class["images"]) == (name, len(given))
        assert line == [given.count(answer) for answer in names]
        assert of_class["top1"] == 100 * given.count(name) / len(given)


def test_both_formats_hold_the_same_and_unreadable_images_are_in_neither(
    colors: Colors, tmp_path: Path
) -> None:
    own = Path(colors.folder(f"{tmp_path.name}-own", {"blue": 3, "red": 2}, seed=5, noise=250))
    (own / "blue" / "1.png").write_bytes(b"damaged")
    for name in ("a.npz", "a.csv"):
        report = _run("knn", colors, test=str(own), predictions=tmp_path / name)
        assert report["predictions"] == str(tmp_path / name)
        assert report["predictions_sha256"] == digest_of_file(tmp_path / name)
        assert "per_class" not in report
    (images, right), (same_images, same) = (
        read_correct(tmp_path / f"a.{x}") for x in ("npz", "csv")
    )
    assert images == same_images == ["blue/0.png", "blue/2.png", "red/0.png", "red/1.png"]
    np.testing.assert_array_equal(right, same)


def test_the_answers_of_the_first_of_the_best_are_kept() -> None:
    best = Best()
    for top1, answer in ((50.0, 1), (60.0, 2), (60.0, 3), (40.0, 4)):
        best.offer(top1, partial(torch.tensor, [answer]))
    again = Best.of(best.state())
    again.offer(55.0, partial(torch.tensor, [5]))
    assert best.answers.tolist() == again.answers.tolist() == [2]


@pytest.mark.parametrize("task", ["dino", "finetune"])
def test_the_answers_of_the_best_epoch_survive_an_interruption(
    task: str, colors: Colors, tmp_path: Path, end_after: Callable[[int | None], None]
) -> None:
    evaluate, settings = MEASURES[task]
    how = {**settings, "options": OPTIONS}

    def run(name: str) -> bytes:
        place = tmp_path / name
        details = Details(predictions=place / "a.csv")
        evaluate(colors.weights, *colors.hard, out=place / "w.safetensors", details=details, **how)
        return (place / "a.csv").read_bytes()

    whole = run("whole")
    end_after(DINO.epochs if task == "dino" else 1)  # only the report is missing, or an epoch
    with pytest.raises(KeyboardInterrupt):
        run("ended")
    end_after(None)
    assert run("ended") == whole


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("a.json", ConfigError, r"name a file of \.npz or \.csv, not"),
        ("thesis.csv", OutputError, "thesis.csv exists"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_first(
    colors: Colors, tmp_path: Path, name: str, error: type[Exception], says: str
) -> None:
    (tmp_path / "thesis.csv").write_text("It began")
    with pytest.raises(error, match=says):
        evaluate_knn("nowhere", "no", "no", details=Details(predictions=tmp_path / name))
    with pytest.raises(DataError, match="cannot be read as predictions"):
        read_correct(tmp_path / "thesis.csv")
    assert colors


def test_intervals_are_the_quantiles_of_all_resamples() -> None:
    for right in ((1, 0, 0), (1, 1, 1, 0, 0), (1, 1, 1, 1, 1)):
        n = len(right)
        means = [100 * sum(drawn) / n for drawn in itertools.product(right, repeat=n)]
        ends = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
        score = {"top1": 100 * sum(right) / n}
        assert intervals(score, images=n) == {"top1": pytest.approx(ends.tolist())}


def test_a_paired_test_counts_the_images_on_which_two_differ() -> None:
    first = np.array([1, 1, 0, 0, 0, 0, 0, 0, 0], dtype=np.bool_)
    second = np.array([1, 0, 1, 1, 1, 1, 1, 1, 1], dtype=np.bool_)
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (1, 7)
    assert found.p == pytest.approx(2 * (1 + 8) / 2**8)
    assert mcnemar(first, first).p == 1


def test_several_tests_are_corrected_for_their_number() -> None:
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def _outcome(weights: str, predictions: Path) -> Outcome:
    report = {
        "task": "knn",
        "weights": weights,
        "backbone": {"name": "vit"},
        "protocol": {},
        "score": {"top1_k20": float(len(weights))},
        "predictions": str(predictions),
        "predictions_sha256": digest_of_file(predictions),
    }
    return Outcome(weights, "teacher", "knn", weights, report)


def test_the_comparison_says_which_differences_are_more_than_chance(tmp_path: Path) -> None:
    right = {"a": [1] * 20, "bb": [0] * 9 + [1] * 11, "ccc": [0] * 8 + [1, 0] + [1] * 10}
    for name, correct in right.items():
        images = [f"{i}.png" for i in range(20)]
        np.savez(tmp_path / f"{name}.npz", image=images, correct=np.array(correct, dtype=np.bool_))
    np.savez(tmp_path / "other.npz", image=["x"], correct=np.ones(1, dtype=np.bool_))
    outcomes = [_outcome(name, tmp_path / f"{name}.npz") for name in right]
    outcomes += [_outcome("others", tmp_path / "other.npz"), _outcome("lost", tmp_path / "no.npz")]
    table = compare(outcomes)
    tests = table.as_json()["columns"][0]["paired_tests"]  # type: ignore[index]  # nested report
    found = {(test["first"], test["second"]): test for test in tests}
    assert list(found) == [("a", "bb"), ("a", "ccc"), ("bb", "ccc")]
    assert found["a", "bb"]["only_first"] == 9
    assert found["a", "bb"]["p_corrected"] == pytest.approx(3 * 2 / 2**9)
    assert [test["more_than_chance"] for test in tests] == [True, True, False]
    write_page(table, tmp_path)
    page = (tmp_path / "compare.html").read_text()
    assert "a is better, by more than chance" in page
    assert "no more than chance" in page


def test_overwritten_predictions_are_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [f"{i}.png" for i in range(20)]
    outcomes = []
    for name, correct in {"a": np.ones(20), "bb": np.zeros(20)}.items():
        file = tmp_path / "same.npz"  # of both runs
        np.savez(file, image=images, correct=correct.astype(np.bool_))
        outcomes.append(_outcome(name, file))
    with caplog.at_level("WARNING"):
        table = compare(outcomes)
    assert table.tests == {0: []}
    assert "another run has overwritten them" in caplog.text
    saved = tmp_path / "saved.json"
    job = Job("a", "teacher", "knn", "knn", saved, lambda: {"input": {}}, lambda: None)
    for outcome, is_used in zip(outcomes, (False, True), strict=True):
        saved.write_text(json.dumps({**(outcome.report or {}), "made_from": {"input": {}}}))
        assert (_saved(job, "here") is not None) == is_used


def test_an_answer_of_no_class_is_never_right(colors: Colors) -> None:
    from dinoscale.evaluate.classification.accuracy import answers

    logits = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [-torch.inf, -torch.inf]])
    assert answers(logits).tolist() == [1, -1, -1]
    assert colors
