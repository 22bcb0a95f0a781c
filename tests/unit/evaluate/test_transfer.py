"""Many sets at once: subsets, splits, and the numbers of `knn` and `logistic` on each set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoscale import cli
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.classification.knn import evaluate_knn
from dinoscale.evaluate.classification.logistic import evaluate_logistic
from dinoscale.evaluate.classification.transfer import (
    ALL,
    Plan,
    _held_out,
    _Summary,
    _summary,
    _unsplit,
    evaluate_transfer,
    few_of_each,
    split_of,
)
from dinoscale.evaluate.frozen_backbone import ExtractionOptions, load_extractor
from tests.unit.evaluate.conftest import Colors

OPTIONS = ExtractionOptions(num_workers=0, cache=False, progress=False)
CS = (0.1, 10.0)


def test_subsets_are_nested_and_of_a_class_on_its_own() -> None:
    labels = np.array([0, 2, 2, 0, 2, 2, 0, 5, 2, 0])
    of = {n: few_of_each(labels, shots=n, seed=3) for n in (1, 2, 4, 9)}
    assert np.bincount(labels[of[1]]).tolist() == [1, 0, 1, 0, 0, 1]
    assert np.bincount(labels[of[4]]).tolist() == [4, 0, 4, 0, 0, 1]
    assert of[9].all()
    assert not (of[1] & ~of[2]).any()
    assert not (of[2] & ~of[4]).any()
    others = np.where(labels == 0, 7, labels)
    assert np.array_equal(few_of_each(others, shots=2, seed=3)[labels == 2], of[2][labels == 2])
    seeds = {few_of_each(labels, shots=2, seed=seed).tobytes() for seed in range(5)}
    assert len(seeds) > 1


def test_a_set_is_split_by_its_folders(tmp_path: Path) -> None:
    assert split_of(str(tmp_path)) is None
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="has train, and neither test nor val beside it"):
        split_of(str(tmp_path))
    (tmp_path / "val").mkdir()
    assert split_of(str(tmp_path)) == (f"{tmp_path}/train", f"{tmp_path}/val")
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="both test and val"):
        split_of(str(tmp_path))


def test_equal_pictures_stay_on_one_side(colors: Colors) -> None:
    """Three copies of each picture: a fifth of the different ones is tested on, with all copies."""
    root = Path(colors.folder("copies", {"red": 5, "blue": 5}))
    for path in [*root.rglob("*.png")]:
        for copy in "ab":
            path.with_name(f"{path.stem}{copy}.png").write_bytes(path.read_bytes())
    report: Any = evaluate_transfer(
        colors.weights, [str(root)], plan=Plan(shots=(1,), seeds=1, cs=CS), options=OPTIONS
    )
    about = report["data"][str(root)]
    assert (about["equal_pictures"], about["test_images"], about["train_images"]) == (20, 6, 24)
    features, same, _ = _unsplit(load_extractor(colors.weights, OPTIONS), str(root))
    assert np.unique(same, return_counts=True)[1].tolist() == [3] * 8
    assert torch.cdist(features.bank, features.test).min() > 1e-3  # copies differ by rounding
    same = np.array([4, 1, 4, 9, 1, 9])
    held = _held_out(np.array([0, 0, 0, 1, 0, 1]), same, seed=0)
    assert held.any()
    assert all(len({*held[same == one]}) == 1 for one in same)


def test_subsets_that_hold_all_images_have_no_spread() -> None:
    labels = torch.tensor([0, 0, 0, 2])
    few = _summary([40.0, 60.0], "2", labels)
    assert (few.mean, few.images) == (50.0, 3)
    assert few.spread == pytest.approx(200**0.5)
    assert _summary([50.0, 50.0], "3", labels) == _Summary(50.0, None, [50.0, 50.0], 4)
    assert _summary([50.0], ALL, labels) == _Summary(50.0, None, [50.0], 4)


def test_scores_are_those_of_knn_and_logistic_and_their_means(
    colors: Colors, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [str(colors.root), colors.hard[0]]  # with train and test; without
    line = ["evaluate", "transfer", str(colors.weights), "--sets", *sets, "--shots", "3", "1"]
    cli.run([*line, "--seeds", "2", "--k", "5", "--c", *map(str, CS), "--num-workers", "0",
             "--no-cache", "--untrained"])  # fmt: skip
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    names = ["logistic_all", "logistic_1", "logistic_3", "knn_all", "knn_1", "knn_3"]
    assert list(report["score"]) == list(report["untrained"]) == names
    both = (colors.weights, colors.train, colors.test)
    knn: Any = evaluate_knn(*both, ks=(5,), options=OPTIONS)
    logistic: Any = evaluate_logistic(*both, cs=CS, options=OPTIONS)
    split, whole = (report["sets"][name] for name in sets)
    assert split["knn"]["all"] == {
        "mean": knn["score"]["top1_k5"], "spread": None, "top1": [knn["score"]["top1_k5"]],
        "images": report["data"][sets[0]]["train_images"],
    }  # fmt: skip
    assert split["logistic"]["all"]["mean"] == logistic["score"]["top1"]
    few = whole["logistic"]["1"]
    assert len(few["top1"]) == 2
    assert few["mean"] == pytest.approx(sum(few["top1"]) / 2)
    assert few["spread"] == pytest.approx(abs(few["top1"][0] - few["top1"][1]) / 2**0.5)
    for name in names:
        classifier, shots = name.split("_")
        means = [each[classifier][shots]["mean"] for each in (split, whole)]
        assert report["score"][name] == pytest.approx(sum(means) / 2)
    assert [report["data"][name]["test_images"] for name in sets] == [12, 9]  # of 16 a class 3
    assert report["data"][sets[1]]["train_images"] == 48 - 9
    assert report["made_from"]["input"].keys() == {"weights", "sets.0", "sets.1"}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(shots=(0,)), "need shots, seeds, k, max_iter and C above 0"),
        (Plan(seeds=0), "need shots, seeds"),
        (Plan(cs=()), "need shots, seeds"),
        (Plan(shots=(5, 5)), r"each number once, got \[5, 5\]"),
    ],
)
def test_settings_out_of_range_are_refused(colors: Colors, plan: Plan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_transfer(colors.weights, [colors.train], plan=plan, options=OPTIONS)


def test_sets_that_cannot_be_measured_are_refused(colors: Colors) -> None:
    with pytest.raises(ConfigError, match="need at least one, each once"):
        evaluate_transfer(colors.weights, [colors.train] * 2, options=OPTIONS)
    single = colors.folder("one_of_each", {"red": 1, "blue": 1})
    with pytest.raises(
        DataError, match="one_of_each: need readable images of two classes at least"
    ):
        evaluate_transfer(colors.weights, [single], options=OPTIONS)
    alone = colors.folder("alone", {"red": 4})
    with pytest.raises(DataError, match="alone: need readable images of two classes at least"):
        evaluate_transfer(colors.weights, [alone], options=OPTIONS)
