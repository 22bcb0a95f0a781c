"""Images with several labels: which file belongs to which image, and accuracies counted by hand."""

from __future__ import annotations

import csv
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoscale import cli
from dinoscale.data.sources.classes import Classes
from dinoscale.errors import DataError
from dinoscale.evaluate.classification.accuracy import num_correct
from dinoscale.evaluate.classification.answers import Details, intervals
from dinoscale.evaluate.classification.kept_probe import (
    _Judgement,
    _score,
    _Truth,
    evaluate_probe,
)
from dinoscale.evaluate.classification.knn import knn_accuracy
from dinoscale.evaluate.classification.logistic import evaluate_logistic
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.evaluate.label_lists import (
    IMAGENET_VAL,
    NO_CLASS,
    LabelLists,
    read_label_lists,
)
from dinoscale.reports.comparison.scores import Outcome, compare
from tests.unit.evaluate.conftest import Colors

OPTIONS = ExtractionOptions(num_workers=0, device="cpu", progress=False)
NAMES = Classes([0, 1, 2], {0: ("blue",), 1: ("green",), 2: ("red",)}, {})
SHARDS = Classes([0, 4], {}, {0: 0, 4: 4})  # of shards: numbers
LISTED = Classes([0, 1], {0: ("n02", "cat"), 1: ("n07", "dog")}, {0: 2, 1: 7})  # of classes.txt
ONE, VAL = ("a/1.png",), "ILSVRC2012_val_00000001.JPEG"
NUMBERS = range(1000)
IMAGENET = Classes([*NUMBERS], {}, {number: number for number in NUMBERS})


class _Images:
    """Images of these names, maybe with numbers of their own classes."""

    class_names = None

    def __init__(self, root: Path, *names: str, own: list[int] | None = None) -> None:
        self._paths = [str(root / name) for name in names]
        self.labels = None if own is None else np.array(own)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        return self._paths[index]


def _read(place: Path, content: object, *names: str, classes: Classes = NAMES) -> list[list[int]]:
    """Classes of each image."""
    file = place / "labels.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    found = read_label_lists(file, _Images(place, *names), str(place), classes)  # type: ignore[arg-type]  # a part of a source
    rows = [[number for number in row if number != NO_CLASS] for row in found.rows.tolist()]
    return rows


def test_images_are_named_by_their_path_or_by_a_name_that_is_there_once(tmp_path: Path) -> None:
    content = {
        **{"a/1.png": ["red", "blue"], "2.png": ["green", "green"], "b/1.png": []},
        "else.png": ["blue"],
    }
    rows = _read(tmp_path, content, "a/1.png", "b/1.png", "b/2.png")
    assert rows == [[2, 0], [], [1]]
    # The name of an image outside all folders is its path.
    content = {"1.png": ["blue"], "a/1.png": ["green"]}
    assert _read(tmp_path, content, "1.png", "a/1.png") == [[0], [1]]


def test_classes_are_named_or_numbered_as_those_of_the_train_set(tmp_path: Path) -> None:
    assert _read(tmp_path, {"1.png": [4]}, "1.png", classes=SHARDS) == [[4]]
    rows = _read(tmp_path, {"1.png": [7, "cat", "n02"]}, "1.png", classes=LISTED)
    assert rows == [[1, 0]]


def test_the_list_of_real_is_matched_by_the_numbers_of_the_images(tmp_path: Path) -> None:
    lists: list[list[int]] = [[] for _ in range(IMAGENET_VAL)]
    lists[1], lists[-1] = [2, 1], [0]
    images = (
        "n01440764/ILSVRC2012_val_00050000_n01440764.JPEG",
        *("red/ILSVRC2012_val_00000002.JPEG", "b/ILSVRC2012_val_00000003.png"),
    )
    assert _read(tmp_path, lists, *images, classes=IMAGENET) == [[0], [2, 1], []]


def test_mere_numbers_are_those_of_imagenet_if_there_are_all(tmp_path: Path) -> None:
    numbers = [*range(1, IMAGENET_VAL + 1)][::-1]
    lists = [[number % 1000] for number in range(IMAGENET_VAL)]
    names = [f"{number:08}.JPEG" for number in numbers]
    rows = _read(tmp_path, lists, *names, classes=IMAGENET)
    assert rows == lists[::-1]
    with pytest.raises(DataError, match=f"the image {names[0]} is not named as one of them"):
        _read(tmp_path, lists, *names[:-1], classes=IMAGENET)


def _numbered(*names: str) -> Classes:
    """Classes of folders of these names, in their order."""
    return Classes([*range(len(names))], {i: (name,) for i, name in enumerate(names)}, {})


def _ids() -> list[str]:
    """WordNet ids of ImageNet's classes."""
    found = find_spec("timm")
    assert found is not None
    assert found.origin is not None
    file = Path(found.origin).with_name("data") / "_info" / "imagenet_synsets.txt"
    return file.read_text().split()


@pytest.mark.parametrize(
    "classes",
    [
        _numbered(*map("class {:03}".format, NUMBERS)),  # readable names, sorted
        _numbered(*map("n{:08}".format, NUMBERS)),  # of ImageNet-21k
        _numbered(*map("n{:08}".format, range(21_841))),
        Classes([*NUMBERS], {}, {number: number + 1 for number in NUMBERS}),
        Classes([*range(1001)], {}, {number: number for number in range(1001)}),
        LISTED,
    ],
)
def test_the_list_of_real_needs_the_classes_of_imagenet(tmp_path: Path, classes: Classes) -> None:
    says = f"nothing says that the {len(classes.present)} classes of train are these"
    with pytest.raises(DataError, match=says):
        _read(tmp_path, [[0]] * IMAGENET_VAL, VAL, classes=classes)


def test_classes_of_imagenet_are_known_by_their_wordnet_ids_or_numbers(tmp_path: Path) -> None:
    ids, lists = _ids(), [[999, 2]] * IMAGENET_VAL
    assert _read(tmp_path, lists, VAL, classes=_numbered(*ids)) == [[999, 2]]
    # Ids hold, whatever the order and the numbers of a list are.
    names = {i: ("name", name) for i, name in enumerate(reversed(ids))}
    listed = Classes([*NUMBERS], names, {number: number + 1 for number in NUMBERS})
    assert _read(tmp_path, lists, VAL, classes=listed) == [[0, 997]]
    folders = sorted(map(str, NUMBERS))  # 0, 1, 10, 100, ...
    numbered = Classes(
        [*NUMBERS], {i: (n,) for i, n in enumerate(folders)}, dict(enumerate(map(int, folders)))
    )
    assert _read(tmp_path, lists, VAL, classes=numbered) == [[999, folders.index("2")]]


def test_the_labels_of_real_are_compared_with_the_own_classes(tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    names = [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 5)]
    file.write_text(json.dumps([[3], [4, 5], [6], [], *[[0]] * (IMAGENET_VAL - 4)]))

    def share(*own: int) -> float | None:
        images = _Images(tmp_path, *names, own=[*own] or None)
        return read_label_lists(file, images, str(tmp_path), IMAGENET).own_class_share  # type: ignore[arg-type]  # a part of a source

    assert share(3, 5, 7, 9) == 2 / 3  # the last one has no label
    assert share() is None
    with pytest.raises(DataError, match=r"only 33\.3 % of the images have their own class among"):
        share(4, 5, 7, 9)


def test_numbers_of_classes_need_numbers_in_the_train_set(tmp_path: Path) -> None:
    mixed = _numbered("0", "1", "10", "2", "other")
    with pytest.raises(
        DataError, match=r"1.png: 2 is no class of train, .* as they are named there"
    ):
        _read(tmp_path, {"1.png": [2]}, "1.png", classes=mixed)
    assert _read(tmp_path, {"1.png": ["2"]}, "1.png", classes=mixed) == [[3]]


@pytest.mark.parametrize(
    ("content", "names", "says"),
    [
        ("{", ONE, "is no JSON of labels"),
        ("3", ONE, "need a list as ReaL's real.json, or an object by image name"),
        ([[0]], ONE, "the labels of the 50000 validation images of ImageNet, this one has 1 entr"),
        ('{"1.png": ["red"], "1.png": ["blue"]}', ONE, "has '1.png' twice. Remove one"),
        ({"1.png": 0}, ONE, "1.png: need a list of classes, got 0"),
        ({"1.png": [0]}, ONE, "1.png: 0 is no class of train, which has 'blue', 'green', 'red'"),
        ({"1.png": ["pink"]}, ONE, "1.png: 'pink' is no class of train"),
        ({"1.png": [True]}, ONE, "1.png: True is no class of train"),
        ({"1.png": [], "unused.png": [9]}, ONE, "unused.png: 9 is no class of train"),
        (
            {"1.png": ["red"]},
            (*ONE, "a/2.png", "3.png"),
            "no labels of the image a/2.png and 1 others",
        ),
        ({"1.png": ["red"], "a/1.png": ["red"]}, ONE, "'a/1.png' and '1.png' are one image"),
        ({"1.png": ["red"]}, (*ONE, "b/1.png"), "'1.png' is the name of several images"),
        (
            [[0]] * IMAGENET_VAL,
            ("ILSVRC2012_val_00050001.png",),
            "ILSVRC2012_val_00050001.png is not named as one of them",
        ),
        *(
            ([[0]] * IMAGENET_VAL, (name,), f"the image {name} is not named as one of them")
            for name in ("ILSVRC2012_test_00000001.JPEG", "IMG_00000002.jpg", "00000003.jpg")
        ),
        ([[0]] * IMAGENET_VAL, ONE, "the image a/1.png is not named as one of them"),
        (
            {"1.png": ["red"]},
            ("1.png", "1.png"),
            "'1.png' is the name of several images",
        ),  # in shards
        (
            [[0]] * IMAGENET_VAL,
            (f"a/{VAL}", f"b/{VAL}"),
            f"a/{VAL} and b/{VAL} have the same number",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_a_sentence(
    tmp_path: Path, content: object, names: tuple[str, ...], says: str
) -> None:
    with pytest.raises(DataError, match=re.escape(says)) as error:
        _read(tmp_path, content, *names)
    assert "labels.json" in str(error.value)


def test_an_answer_is_right_if_it_is_among_the_labels() -> None:
    logits = torch.arange(7.0).repeat(4, 1)  # class 6 first, then 5, 4, 3, 2
    logits[3] = torch.nan
    labels = torch.tensor([[6, 0], [0, 2], [2, 1], [6, NO_CLASS]])
    top1, top5 = num_correct(logits, labels)
    assert (int(top1), int(top5)) == (1, 3)
    features = torch.eye(3)  # whose neighbours are of the classes 0, 1, 2
    found = knn_accuracy(features, torch.arange(3), features, labels[:3], ks=(1,))[1]
    assert found.top1 == pytest.approx(100 * 2 / 3)


def test_of_several_labels_there_is_no_top_5() -> None:
    right = _Judgement(torch.zeros(4), top1=1, top5=2, top1_of_all=1)
    labels, classes = torch.zeros(4, 1), list(range(6))
    one = _score(right, _Truth(classes, labels), images=4, trained=6)
    lists = LabelLists(labels, "")
    several = _score(right, _Truth(classes, labels, lists), images=4, trained=6)
    assert (one, several) == ({"top1": 25, "top5": 50}, {"top1": 25})


LABELS: dict[str, list[str]] = {
    "b0.png": ["blue"],
    "b1.png": ["red", "blue"],
    "b2.png": ["green", "red"],  # the only wrong one
    "damaged.png": ["red"],
    "g0.png": [],
    "r0.png": ["red", "green"],
}


@pytest.fixture(scope="module")
def flat(colors: Colors) -> str:
    """Clean pictures in one folder, whose colors every classifier tells apart."""
    by_class = Path(colors.folder("by-class", {"blue": 3, "green": 1, "red": 1}, seed=4))
    folder = colors.root / "flat"
    folder.mkdir()
    for picture in by_class.rglob("*.png"):
        picture.rename(folder / f"{picture.parent.name[0]}{picture.name}")
    (folder / "damaged.png").write_bytes(b"damaged")
    return str(folder)


def _labels(place: Path, labels: dict[str, list[str]] = LABELS) -> Path:
    file = place / f"{len(list(place.iterdir()))}.json"
    file.write_text(json.dumps(labels))
    return file


def _check(report: dict[str, Any], predictions: Path) -> None:
    """Three of four answers are right; one image cannot be read, and one is not counted."""
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert next(iter(report["score"].values())) == 75
    assert not any("top5" in name for name in report["score"])
    test = {name: report["test"][name] for name in ("images", "unreadable", "without_label")}
    assert test == {"images": 4, "unreadable": 1, "without_label": 1}
    assert report["test"]["classes"] == 3
    assert next(iter(report["intervals"].values())) == intervals({"x": 75}, images=4)["x"]
    assert "confusion" not in report
    assert [tuple(of_class.values()) for of_class in report["per_class"]] == [
        *(("blue", 2, 100), ("green", 2, 50), ("red", 3, pytest.approx(200 / 3))),
    ]
    with predictions.open(newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        ("b0.png", "blue", "blue", "1"),
        ("b1.png", "red | blue", "blue", "1"),
        ("b2.png", "green | red", "blue", "0"),
        ("r0.png", "red | green", "red", "1"),
    ]


def test_k_nn_is_judged_by_all_labels_of_an_image(
    colors: Colors, flat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, predictions = _labels(tmp_path), tmp_path / "answers.csv"
    words = ("--train", colors.train, "--test", flat, "--k", "3", "--num-workers", "0")
    more = ("--labels", str(file), "--per-class", "--predictions", str(predictions))
    cli.run(["evaluate", "knn", str(colors.weights), *words, *more, "--pixels", "--untrained"])
    report = json.loads(capsys.readouterr().out)
    _check(report, predictions)
    assert report["knn"] == {"3": {"top1": 75, "neighbours": 3}}
    assert report["floors"] == {"top1_k3": 75}
    assert "labels" in report["made_from"]["input"]


def test_a_kept_classifier_is_judged_by_all_labels_of_an_image(
    colors: Colors, flat: str, tmp_path: Path
) -> None:
    kept, predictions = tmp_path / "kept.safetensors", tmp_path / "answers.csv"
    sets = (colors.train, colors.test)
    evaluate_logistic(colors.weights, *sets, cs=(100.0,), out=kept, options=OPTIONS)

    def judge(labels: dict[str, list[str]], **details: Any) -> dict[str, Any]:
        file = _labels(tmp_path, labels)
        how = {"labels_path": file, "details": Details(**details), "options": OPTIONS}
        return evaluate_probe(colors.weights, kept, flat, **how)  # type: ignore[arg-type]  # several types

    found = judge(LABELS, per_class=True, predictions=predictions)
    _check(found, predictions)
    # Green competes where the file does not name it, and is the wrong answer to g0.
    without = {name: [c for c in names if c != "green"] for name, names in LABELS.items()}
    few = judge({**without, "g0.png": ["blue", "red"]})
    assert few["score"] == {"top1": 60}
    assert few["protocol"]["competing_classes"] == 3
    # Other labels are another column, even if all numbers agree.
    other = judge({**LABELS, "b0.png": ["blue", "green"]})
    reports = [found, judge(LABELS), other]
    outcomes = [Outcome(f"w{i}", "teacher", "probe", "", r) for i, r in enumerate(reports)]
    assert [list(row.cells) for row in compare(outcomes).rows] == [[0], [0], [1]]
    with pytest.raises(DataError, match="none of the images that can be read has one"):
        judge({name: [] for name in LABELS})
