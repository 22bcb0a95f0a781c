"""Logistic regression: scikit-learn's own numbers, and a test set that chooses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from dinoscale.convert.weights_file import load_backbone
from dinoscale.data.sources.source import open_source
from dinoscale.errors import ConfigError, DataError, OutputError
from dinoscale.evaluate.classification.logistic import (
    CS,
    evaluate_logistic,
    fit_and_score,
    held_out,
)
from dinoscale.evaluate.features import extract_features
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from tests.unit.evaluate.conftest import CARD, Colors

SOME_CS = (1e-4, 1.0, 1e2)


def _run(colors: Colors, train: str, test: str, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "cs": SOME_CS,
        "options": ExtractionOptions(num_workers=0, device="cpu", progress=False),
    }
    return evaluate_logistic(colors.weights, train, test, **{**settings, **changes})


def _features(colors: Colors, spec: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    features, labels = extract_features(
        load_backbone(colors.weights)[0],
        open_source(spec),
        resize=CARD.resize,
        crop=CARD.crop,
        mean=CARD.mean,
        std=CARD.std,
        batch_size=7,
        device="cpu",
        num_workers=0,
    )
    return normalize(features.double().numpy()), labels.numpy()


def test_the_whole_measurement_equals_scikit_learn_called_directly(colors: Colors) -> None:
    report = _run(colors, *colors.hard)
    (train, labels), (test, test_labels) = (_features(colors, spec) for spec in colors.hard)
    held = held_out(labels, seed=0)
    accuracies = []
    for c in SOME_CS:
        model = LogisticRegression(C=c, max_iter=1000).fit(train[~held], labels[~held])
        accuracies.append(100 * model.score(train[held], labels[held]))
    assert [entry["top1"] for entry in report["held_out"]] == pytest.approx(accuracies)
    best = SOME_CS[int(np.argmax(accuracies))]
    assert report["chosen"]["c"] == best
    model = LogisticRegression(C=best, max_iter=1000).fit(train, labels)
    assert report["score"]["top1"] == pytest.approx(100 * model.score(test, test_labels))
    assert report["score"]["top1"] < 100  # else everything would agree


def test_of_equal_accuracies_the_strongest_penalty_is_chosen(colors: Colors) -> None:
    report = _run(colors, colors.train, colors.test, cs=(100.0, 10.0))
    assert [entry["top1"] for entry in report["held_out"]] == [100.0, 100.0]
    assert report["chosen"]["c"] == 10.0


def test_scores_are_those_of_scikit_learn_by_class_number() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), np.repeat([1, 4, 6], 20)
    tests = rng.normal(size=(9, 5))
    scores, iterations = fit_and_score(features, labels, tests, c=3.0, max_iter=500)
    model = LogisticRegression(C=3.0, max_iter=500).fit(features, labels)
    np.testing.assert_array_equal(scores[:, [1, 4, 6]], model.decision_function(tests))
    assert np.isneginf(scores[:, [0, 2, 3, 5]]).all()
    assert iterations == model.n_iter_.max()


def test_each_of_two_classes_has_a_score() -> None:
    features, labels = np.array([[-1.0], [1.0]]), np.array([0, 1])
    scores, _ = fit_and_score(features, labels, np.array([[-2.0], [3.0]]), c=10.0, max_iter=100)
    assert scores.argmax(axis=1).tolist() == [0, 1]


def test_a_tenth_of_each_class_is_held_out_and_each_keeps_one() -> None:
    labels = np.repeat([0, 1, 2, 5], [40, 20, 2, 1])
    held = held_out(labels, seed=0)
    assert np.bincount(labels[held], minlength=6).tolist() == [4, 2, 1, 0, 0, 0]
    assert not np.array_equal(held, held_out(labels, seed=1))
    np.testing.assert_array_equal(held, held_out(labels, seed=0))


def test_classes_of_single_images_leave_none_to_hold_out() -> None:
    with pytest.raises(DataError, match="single image"):
        held_out(np.arange(5), seed=0)


def test_separable_classes_are_classified_perfectly_and_logged(
    colors: Colors, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    report = _run(colors, colors.train, colors.test, log_path=log, untrained=True)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["score"] == {"top1": 100.0}
    assert report["untrained"].keys() == {"top1"}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["network"] for line in lines] == ["trained"] * 4 + ["untrained"] * 4
    assert [line["held_out"]["c"] for line in lines[:3]] == list(SOME_CS)
    _run(colors, colors.train, colors.test, log_path=log, seed=1)
    settings = [json.loads(line)["settings"] for line in log.read_text().splitlines()]
    assert len(set(settings[:8])) == len(set(settings[8:])) == 1 != len(set(settings))


def test_results_are_not_appended_to_another_file(colors: Colors, tmp_path: Path) -> None:
    for name, text in (("thesis.txt", "It began"), ("run.jsonl", '{"step": 1}\n'), ("n", "1\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(OutputError, match=f"{name} exists and is no log of results"):
            _run(colors, colors.train, colors.test, log_path=tmp_path / name)
        assert (tmp_path / name).read_text() == text


def test_the_default_grid_is_the_published_one() -> None:
    expected = (10 ** torch.linspace(-6, 5, 45, dtype=torch.float64)).tolist()
    assert list(CS) == pytest.approx(expected)


@pytest.mark.parametrize("change", [{"cs": ()}, {"cs": (0.0,)}, {"max_iter": 0}, {"seed": -1}])
def test_bad_settings_are_refused(colors: Colors, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="need C > 0"):
        _run(colors, colors.train, colors.test, **change)
