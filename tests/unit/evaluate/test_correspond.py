"""Correspondence: matching and PCK by hand, warps of a picture of coordinates, kinds of pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor, nn

from dinoscale import cli
from dinoscale.data.decoding.decode import Picture
from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.evaluate.any_size import WholeImages
from dinoscale.evaluate.correspondence.correspond import (
    SHEET,
    Given,
    Matcher,
    evaluate_correspond,
)
from dinoscale.evaluate.correspondence.figure import HEIGHT, LEGEND, RIGHT, TRUE, WRONG
from dinoscale.evaluate.correspondence.matching import (
    find_places,
    nearest_centers,
    patch_centers,
    pck,
)
from dinoscale.evaluate.correspondence.views import WarpedPictures
from dinoscale.evaluate.correspondence.warps import draw_warp
from dinoscale.evaluate.frozen_backbone import DEFAULT_LOADING, LoadedBackbone
from tests.unit.evaluate.tiny_files import CARD, as_json, save_picture, save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


def test_places_are_found_at_the_center_of_the_most_similar_patch() -> None:
    source = torch.eye(6).view(2, 3, 6)
    target = 5 * torch.eye(6)[[3, 4, 5, 0, 1, 2]].view(3, 2, 6)  # of another shape and length
    found = find_places(source, target, patch_centers(2, 3))
    assert found.tolist() == patch_centers(3, 2)[[3, 4, 5, 0, 1, 2]].tolist()
    between = np.array([[0.4, 0.25], [0.0, 1.0]])  # nearer to patch 1 than to 0; beyond patch 3
    assert find_places(source, target, between).tolist() == patch_centers(3, 2)[[4, 0]].tolist()


def test_centers_of_patches_by_hand() -> None:
    assert patch_centers(1, 2).tolist() == [[0.25, 0.5], [0.75, 0.5]]
    places = np.array([[0.0, 0.0], [0.6, 0.3], [1.0, 1.0]])
    assert nearest_centers(1, 2, places).tolist() == [[0.25, 0.5], [0.75, 0.5], [0.75, 0.5]]


def test_pck_is_the_mean_over_pairs_of_the_share_of_points() -> None:
    errors = [np.array([0.05, 0.1, 0.11, 0.2]), np.array([0.0])]
    assert pck(errors, 0.1) == pytest.approx(100 * (2 / 4 + 1) / 2)
    assert pck(errors, 0.05) == pytest.approx(100 * (1 / 4 + 1) / 2)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_warped_picture_shows_each_place_where_the_warp_says(axis: int) -> None:
    width, height = 30, 20
    pixels = np.indices((height, width))[1 - axis].astype(np.float32) + 0.5  # x or y of the center
    for index in range(3):
        warp = draw_warp(width, height, seed=1, index=index)
        warped = np.asarray(warp.picture(Image.fromarray(pixels)))
        points = np.array([[15.0, 10.0], [11.5, 8.5], [18.0, 12.0]])
        for point, (x, y) in zip(points, warp.places(points), strict=True):
            column, row = int(x - 0.5), int(y - 0.5)  # of the pixel whose center is upper left
            right, lower = x - 0.5 - column, y - 0.5 - row
            corners = warped[row : row + 2, column : column + 2]
            value = np.array([1 - lower, lower]) @ corners @ np.array([1 - right, right])
            # Pillow's cubic is off by at most 0.097 on a ramp; half a pixel would be 0.5.
            assert value == pytest.approx(point[axis], abs=0.1)


def test_warps_are_drawn_by_seed_and_picture() -> None:
    first = draw_warp(40, 30, seed=0, index=0)
    assert np.array_equal(first.matrix, draw_warp(40, 30, seed=0, index=0).matrix)
    for other in (draw_warp(40, 30, seed=1, index=0), draw_warp(40, 30, seed=0, index=1)):
        assert not np.array_equal(first.matrix, other.matrix)
    linear = first.matrix[:, :2]
    zoom = math.sqrt(np.linalg.det(linear))
    assert 1 / 1.4 <= zoom <= 1.4
    np.testing.assert_allclose(linear @ linear.T, zoom**2 * np.eye(2), atol=1e-12)
    moved = first.places(np.array([[20.0, 15.0]])) - (20, 15)
    assert (abs(moved) <= (10, 7.5)).all()


class _Coordinates:
    """A picture whose red and green are x and y; blue sets its middle apart from its mean color."""

    def __init__(self, side: int) -> None:
        y, x = (np.indices((side, side)) + 0.5) / side
        middle = 1 - np.maximum(abs(2 * x - 1), abs(2 * y - 1))
        self._pixels = (255 * np.stack([x, y, middle], axis=-1)).round().astype(np.uint8)
        self.labels: NDArray[np.int64] | None = None
        self.class_names: list[str] | None = None

    def __len__(self) -> int:
        return 1

    def path(self, index: int) -> str:
        return f"picture {index}"

    def picture(self, index: int) -> Picture:
        return Picture.of(self._pixels, self.path(index))


class _Colors(nn.Module):
    """Features of a patch are angles of its mean color: near features are near colors."""

    patch_size, last_attention = 4, print

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def features(self, images: Tensor) -> Tensor:
        mean = F.avg_pool2d(images, self.patch_size).flatten(2).transpose(1, 2)  # (N, P, 3)
        angles = math.pi / 2 * (mean * 0.2 + 0.5)  # of 0..1, undoing the card's mean and std
        tokens = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return F.pad(tokens, (0, 0, 1, 0))  # a class token


def test_features_that_are_coordinates_find_every_place_after_a_warp() -> None:
    loaded = LoadedBackbone("", _Colors(), CARD, torch.device("cpu"), DEFAULT_LOADING)
    whole = WholeImages.of(loaded, size=128, square=False)
    for seed in range(3):
        pairs = WarpedPictures(_Coordinates(128), whole.fit, seed=seed, limit=None)
        result = Matcher(pairs, {"score": whole}, "patches").result(0)
        assert pck([result.errors["score"]], 0.1) == 100.0
        # The edge of the warped picture cuts some patches, which show its mean color too.
        assert pck([result.errors["score"]], 0.05) > 99.0
        assert pck([result.errors["best_possible"]], 0.05) == 100.0
        assert pck([result.errors["same_position"]], 0.1) < 60.0
        assert len(result.errors["score"]) > 32 * 32 // 3


def _entry(**changes: Any) -> dict[str, Any]:
    """Two points, found at the same position with errors of 3 and 6 of 40 pixels."""
    entry = {
        "source": "cat/a.png",
        "target": "cat/b.png",
        "source_points": [[10, 10], [20, 20]],
        "target_points": [[10, 13], [20, 26]],
        "target_box": [0, 0, 40, 30],
        "category": "cat",
    }
    return {key: value for key, value in (entry | changes).items() if value is not None}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "JPEGImages"
    save_picture(folder / "cat" / "a.png", seed=0, size=(40, 40))
    save_picture(folder / "cat" / "b.png", seed=1, size=(40, 40))
    return folder


def _given(pictures: Path, *entries: object, **more: Any) -> Given:
    file = pictures.parent / "pairs.json"
    file.write_text(json.dumps(entries))
    return Given(pairs=str(file), images=str(pictures), **more)


def test_scores_of_the_same_position_and_of_the_right_patch_by_hand(
    pictures: Path, weights: Path
) -> None:
    given = _given(pictures, _entry())
    report = evaluate_correspond(weights, given, size=40)
    same, pixels = as_json(report)["baselines"].values()
    assert same == {"pck@0.1": 50.0, "pck@0.05": 0.0}
    assert report["floors"] == max(same, pixels, key=lambda score: score["pck@0.1"])
    # Patches of 8: centers (12, 12) and (20, 28), sqrt(5) and 2 pixels from the points.
    assert report["best_possible"] == {"pck@0.1": 100.0, "pck@0.05": 50.0}
    loaded = as_json(report)
    assert (loaded["data"]["number"], loaded["data"]["points"]) == (1, 2)
    assert loaded["categories"] == {"cat": report["score"]}
    alone = evaluate_correspond(weights, _given(pictures, _entry(target_box=None)), size=40)
    same = evaluate_correspond(
        weights, _given(pictures, _entry(target_box=[0, 0, 9, 9]), length_of="image"), size=40
    )
    assert alone["score"] == same["score"]
    assert "image" in alone["protocol"]["length_of"]  # type: ignore[index]  # nested
    # The same picture twice: every point is found up to its patch.
    identical = _entry(target="cat/a.png", target_points=[[10, 10], [20, 20]])
    report = evaluate_correspond(weights, _given(pictures, identical), size=40, untrained=True)
    assert as_json(report)["baselines"]["same_position"] == {"pck@0.1": 100.0, "pck@0.05": 100.0}
    assert report["score"] == report["untrained"]


def test_spair_71k_scores_as_the_same_list_of_pairs(pictures: Path, weights: Path) -> None:
    root = pictures.parent
    for split, points in (("test", [[10, 13], [20, 26]]), ("val", [[10, 10], [20, 20]])):
        entry = {
            "src_imname": "a.png", "trg_imname": "b.png", "category": "cat",
            "src_kps": [[10, 10], [20, 20]], "trg_kps": points, "trg_bndbox": [0, 0, 40, 30],
        }  # fmt: skip
        file = root / "PairAnnotation" / split / "000001-a-b:cat.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(entry))
    keys = ("score", "baselines", "best_possible", "by_point", "categories", "protocol")
    test = evaluate_correspond(weights, Given(pairs=str(root)), size=40)
    listed = evaluate_correspond(weights, _given(pictures, _entry()), size=40)
    assert {key: test[key] for key in keys} == {key: listed[key] for key in keys}
    val = evaluate_correspond(weights, Given(pairs=str(root), split="val"), size=40)
    assert as_json(val)["baselines"]["same_position"] == {"pck@0.1": 100.0, "pck@0.05": 100.0}
    with pytest.raises(DataError, match=r"none: holds no pairs; there are test, val"):
        evaluate_correspond(weights, Given(pairs=str(root), split="none"))
    with pytest.raises(ConfigError, match="SPair-71k has its own in JPEGImages"):
        evaluate_correspond(weights, Given(pairs=str(root), images=str(pictures)))
    (file).write_text("{}")
    with pytest.raises(DataError, match=r"is no pair of SPair-71k \('category' is missing\)"):
        evaluate_correspond(weights, Given(pairs=str(root), split="val"))


def test_points_outside_their_pictures_and_damaged_pictures_are_left_out(
    pictures: Path, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = evaluate_correspond(weights, _given(pictures, _entry()), size=40)
    (pictures / "broken.png").write_bytes((pictures / "cat" / "a.png").read_bytes()[:200])
    inside = [[10, 10], [20, 20]], [[10, 13], [20, 26]]
    more = inside[0] + [[41, 3], [3, -1], [5, 5]], inside[1] + [[3, 3], [3, 3], [41, 5]]
    given = _given(
        pictures,
        _entry(source_points=more[0], target_points=more[1]),
        _entry(source="broken.png"),
        _entry(source_points=[[50, 50]], target_points=[[3, 3]]),
    )
    report = evaluate_correspond(weights, given, size=40)
    keys = ("score", "baselines", "data")
    assert {key: report[key] for key in keys} == {key: whole[key] for key in keys}
    left_out = as_json(report)["left_out"]
    assert left_out["points_outside"] == 3
    broken, nowhere = left_out["pairs"]
    assert "broken.png: " in broken
    assert "no key point lies on both pictures" in nowhere
    assert "left out 3 key points" in caplog.text
    (pictures / "list.txt").write_text("cat/a.png\ngone.png\n")  # which may be readable later
    with pytest.raises(UnavailableError, match=r"gone\.png: cannot be read"):
        evaluate_correspond(weights, Given(images=f"{pictures}/list.txt", warp=True), size=40)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (_entry(source="cat/c.png"), r"pair 0: its picture .*cat/c\.png does not exist \(1 of 2 "),
        (_entry(target_points=[[1, 1]]), "pair 0: has 2 points in the source, 1 in the target"),
        (_entry(target_points=None), r"pair 0: need source, target, .*KeyError: 'target_points'"),
        (_entry(source_points=[[1, 2, 3]]), "as lists of"),
        (_entry(source_points=[["a", 2]]), "as lists of"),
        (_entry(source_points=[[math.inf, 2], [1, 1]]), "no finite number"),
        (_entry(target_box=[5, 5, 5, 9]), r"the target's box \[5.0, 5.0, 5.0, 9.0\] is empty"),
        ("a pair", "pair 0: need source"),
        (_entry(source="../pairs.json"), r"its picture .*/\.\./pairs\.json is not below .*Images"),
        (_entry(target="/etc/hosts"), r"pair 0: its picture /etc/hosts is not below"),
    ],
)
def test_wrong_pairs_are_refused(
    pictures: Path, weights: Path, entry: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_correspond(weights, _given(pictures, entry), size=40)


def _wrong_options(pictures: Path) -> Iterator[tuple[Given, str]]:
    given = _given(pictures, _entry(), _entry(target_box=None))
    file, images = given.pairs, given.images
    yield Given(), "give --pairs PAIRS, or --images DATA and --warp"
    yield Given(pairs=file, images=images, warp=True), "give --pairs PAIRS, or"
    yield Given(warp=True), "give --pairs PAIRS, or"
    yield Given(warp=True, images=images, split="val"), "--split and --length-of are of --pairs"
    yield Given(pairs=file, images=images, seed=3), "--seed is of --warp"
    yield Given(warp=True, images=images, seed=-1), "--seed: need 0 or more, got -1"
    yield Given(pairs=file), "name the folder of the pictures"
    yield Given(pairs=file, images=images, split="val"), "is not SPair-71k"
    yield Given(pairs=file, images=images, limit=0), "at least one pair, got 0"
    yield Given(warp=True, images=images, limit=0), "at least one image, got 0"
    yield Given(pairs=file, images=images, length_of="box"), r"pair 1: has no target_box"


def test_options_that_do_not_go_together_are_refused(pictures: Path, weights: Path) -> None:
    for given, message in _wrong_options(pictures):
        with pytest.raises(ConfigError, match=message):
            evaluate_correspond(weights, given, size=40)
    for content, message in (("{}", "need a list of pairs"), ("[", "not JSON"), ("[]", "no pairs")):
        (pictures.parent / "pairs.json").write_text(content)
        given = Given(pairs=str(pictures.parent / "pairs.json"), images=str(pictures))
        with pytest.raises(DataError, match=message):
            evaluate_correspond(weights, given)


def test_the_command_warps_one_picture_and_draws_it(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, out = save_picture(tmp_path / "one.jpg", seed=2, size=(45, 30)), tmp_path / "out"
    cli.run(["evaluate", "correspond", str(weights), "--images", str(picture), "--warp",
             "--size", "32", "--untrained", "--features", "keys", "--out", str(out)])  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    given = Given(images=str(picture), warp=True)
    same = evaluate_correspond(weights, given, size=32, features="keys")
    assert (report["score"], report["data"]) == (same["score"], same["data"])
    assert report["made_from"]["input"].keys() == {"weights", "images"}
    other = Given(images=str(picture), warp=True, seed=1)
    assert evaluate_correspond(weights, other, size=32)["baselines"] != report["baselines"]
    assert report["best_possible"]["pck@0.1"] > report["floors"]["pck@0.1"]
    assert report["floors"]["pck@0.1"] == max(b["pck@0.1"] for b in report["baselines"].values())
    assert list(report["score"]) == ["pck@0.1", "pck@0.05"]
    with Image.open(out / SHEET) as sheet:
        assert sheet.height == LEGEND + HEIGHT
        legend = sheet.crop((0, 0, sheet.width, LEGEND))
    words = {color for _, color in legend.getcolors(legend.width * LEGEND) or ()}
    assert words >= {ImageColor.getrgb(color) for color in (RIGHT, WRONG, TRUE)}
