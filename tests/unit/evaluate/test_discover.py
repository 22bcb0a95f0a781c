"""Object discovery: the cut and LOST by hand, CorLoc by hand, true boxes of every layout."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import eigh
from torch import Tensor

from dinoscale import cli
from dinoscale.data.sources.source import open_source
from dinoscale.errors import ConfigError, DataError, UnavailableError
from dinoscale.evaluate.any_size import Fit, FittedImages
from dinoscale.evaluate.dense.object_masks import split_objects
from dinoscale.evaluate.discovery import regions
from dinoscale.evaluate.discovery.boxes import find_boxes, iou_of_boxes
from dinoscale.evaluate.discovery.discover import BOXES, SHEET, Settings, evaluate_discover
from dinoscale.evaluate.discovery.regions import WEAK_EDGE, lost, normalised_cut, token_cut
from dinoscale.evaluate.discovery.truth import Annotations, boxes_of_masks
from tests.unit.evaluate.tiny_files import as_json, save_picture, save_weights

WHOLE = Settings(tau=-1.0)  # joins all patches: the object is the whole picture


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two images, of 40 x 24 and 19 x 16 pixels; their objects cover 1/4 and 3/4."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    (masks / "sub").mkdir(parents=True)
    save_picture(images / "a.jpg", seed=0, size=(40, 24))
    save_picture(images / "sub" / "b.jpg", seed=1, size=(19, 16))
    quarter, most = np.zeros((24, 40), np.uint8), np.full((16, 19), 255, np.uint8)
    quarter[:12, 20:] = 7
    most[:4] = 0
    mask = Image.fromarray(quarter)
    mask.putpalette(list(range(256)) * 3)
    mask.save(masks / "a.png")
    Image.fromarray(most).save(masks / "sub" / "b.png")
    return images, masks


def _measured(
    weights: Path,
    images: str | Path,
    *,
    masks: str | None = None,
    boxes: Path | None = None,
    size: int = 16,
    **more: Any,
) -> dict[str, Any]:
    annotations = Annotations(masks, None if boxes is None else str(boxes))
    return as_json(
        evaluate_discover(weights, str(images), annotations=annotations, size=size, **more)
    )


@pytest.mark.parametrize("patches", [12, 60])  # by all eigenvectors, and by Lanczos
def test_the_cut_is_the_second_generalised_eigenvector(patches: int) -> None:
    rng = np.random.default_rng(0)
    inside = np.arange(patches) < patches // 3
    joined = (inside[:, None] == inside) & (rng.random((patches, patches)) < 0.8)
    joined[0, -1] = True  # one edge between the blocks
    edges = np.where(joined | joined.T | np.eye(patches, dtype=bool), 1.0, WEAK_EDGE)
    degrees = np.diag(edges.sum(axis=0))
    values, vectors = eigh(degrees - edges, degrees)
    assert values[0] == pytest.approx(0, abs=1e-12)
    found, expected = normalised_cut(edges), vectors[:, 1]
    found *= (found @ expected) / (found @ found)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert len({*np.sign(found[inside]), *-np.sign(found[~inside])}) == 1  # it splits the blocks


def _planted(width: float = 0.0) -> Tensor:
    """(6, 8, 3): a block of 2 x 3, a lone patch like it, and a background of cosine `width`."""
    features = torch.tensor([1.0, 0.0, 0.0]).repeat(6, 8, 1)
    features[2:4, 1:4] = features[5, 7] = torch.tensor([width, (1 - width**2) ** 0.5, 0.0])
    return 3 * features


def test_token_cut_finds_the_connected_part_of_the_planted_object() -> None:
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[2:4, 1:4] = True
    region = token_cut(_planted())
    assert region.map.max() == region.map[region.seed] == abs(region.map).max()
    assert np.array_equal(region.map > region.map.mean(), _planted()[..., 1].numpy() > 0)
    assert region.mask[region.seed]
    # Both parts of the object are equally strong; the seed is one of them.
    assert region.seed == (5, 7) or np.array_equal(region.mask, expected)
    features = _planted()
    features[2:4, 1:4, 2] = 1.0  # no longer like the lone patch exactly, but joined to it
    features[0, 0] = features[5, 7] = torch.tensor([3.0, 0.0, 0.0])
    region = token_cut(features)
    assert np.array_equal(region.mask, expected)
    assert region.box(80, 30) == (10.0, 10.0, 40.0, 20.0)


def test_patches_that_are_all_alike_are_one_object() -> None:
    assert token_cut(_planted(width=0.5)).mask.all()  # joined from a cosine of 0.2 on
    assert not token_cut(_planted(width=0.5), tau=0.6).mask.all()
    assert token_cut(torch.ones(1, 1, 4)).mask.all()


def test_lost_by_hand() -> None:
    of_object, background, mixed = (-1.0, 1.0), (1.0, 0.0), (3.0, 4.0)
    # Not negative: object and object, mixed and all, background and background. Degrees 3, 4, 6.
    features = torch.tensor([of_object] * 2 + [background] * 3 + [mixed])[None]
    region = lost(features, expansion=2)  # seeds 0, 1; sums 4, -2, 2: the last is not connected
    assert region.seed == (0, 0)
    assert region.map.tolist() == [[4, 4, -2, -2, -2, 2]]
    assert region.mask.tolist() == [[True, True, False, False, False, False]]
    region = lost(features)  # seeds 0, 1, 5; the sums of the background are -1 - 1 + 3
    assert region.map.tolist() == [[5, 5, 1, 1, 1, 27]]
    assert region.mask.all()


def test_lost_of_many_patches_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0))
    whole = lost(features, expansion=9)
    monkeypatch.setattr(regions, "ROWS_AT_ONCE", 3)
    parts = lost(features, expansion=9)
    assert np.array_equal(parts.mask, whole.mask)
    assert parts.seed == whole.seed


def test_overlap_of_boxes_by_hand() -> None:
    box = np.array([0.0, 0.0, 4.0, 2.0])
    others = np.array([[0, 0, 4, 2], [2, 0, 6, 2], [4, 0, 8, 2], [1, 0, 3, 1]], np.float64)
    assert iou_of_boxes(box, others).tolist() == pytest.approx([1, 4 / 12, 0, 2 / 8])


def test_boxes_of_numbered_masks_leave_void_out() -> None:
    numbers = np.zeros((5, 6), np.uint8)
    numbers[1:3, 2:6], numbers[1, 4], numbers[4, 0], numbers[4, 1] = 3, 255, 9, 255
    objects = split_objects(Image.fromarray(numbers), indexed=True)
    assert boxes_of_masks(objects).tolist() == [[2, 1, 6, 3], [0, 4, 1, 5]]


def test_an_object_of_the_whole_picture_scores_the_area_of_the_true_one(
    folders: tuple[Path, Path], weights: Path
) -> None:
    images, masks = map(str, folders)
    report = _measured(weights, images, masks=masks, settings=WHOLE, untrained=True)
    expected = {"corloc": 50.0, "jaccard": pytest.approx(50.0)}
    assert report["score"] == report["untrained"] == expected
    a = 10 * 6 / (2 * 10 * 24 - 10 * 6)  # the centered box meets the corner with a quarter
    b = 9 * 8 / (19 * 12)  # it lies in the object; as a mask it has 9 of 19 columns
    assert report["floors"] == {"corloc": 0.0, "jaccard": pytest.approx(100 * (a + b) / 2)}
    assert report["images"] == 2


def test_images_of_more_patches_than_can_be_cut_are_left_out_at_the_start(
    folders: tuple[Path, Path], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, masks = map(str, folders)
    monkeypatch.setattr(regions, "MAX_PATCHES", 4)  # of patches of 8 pixels: a has 3 x 2
    report = _measured(weights, images, masks=masks, settings=WHOLE)
    assert report["images"] == 1
    (reason,) = report["left_out"]["unreadable"]
    assert reason.endswith(
        "a.jpg: 3 x 2 patches are more than the 4 of which a graph is cut."
        " Choose a smaller size, or the method lost."
    )
    assert _measured(weights, images, masks=masks, settings=Settings("lost"))["images"] == 2
    monkeypatch.setattr(regions, "MAX_PATCHES", 3)  # b has 2 x 2
    with pytest.raises(DataError, match=r"none of 2 images .* more than the 3 .* the method lost"):
        _measured(weights, images, masks=masks)
    with pytest.raises(DataError, match="3 x 2 patches are more than the 3"):
        token_cut(torch.ones(2, 3, 4))


def _as_xml(boxes: list[list[int]]) -> str:
    """VOC counts pixels from 1, and names the last one."""
    names = ("xmin", "ymin", "xmax", "ymax")
    inner = ""
    for left, top, right, bottom in boxes:
        corners = zip(names, (left + 1, top + 1, right, bottom), strict=True)
        inner += "".join(
            ["<object><part><bndbox/></part><bndbox>", *(f"<{n}>{v}</{n}>" for n, v in corners)]
        )
        inner += "</bndbox></object>"
    return f"<annotation>{inner}</annotation>"


def _save_xml(folder: Path, boxes: dict[str, list[list[int]]]) -> Path:
    for name, of_image in boxes.items():
        file = (folder / "xml" / name).with_suffix(".xml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_as_xml(of_image))
    return folder / "xml"


def _save_json(folder: Path, boxes: dict[str, list[list[int]]]) -> Path:
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return folder / "boxes.json"


def _save_coco(folder: Path, boxes: dict[str, list[list[int]]]) -> Path:
    images = [{"id": 7 + i, "file_name": name} for i, name in enumerate(boxes)]
    annotations = [
        {"image_id": 7 + i, "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]], "iscrowd": 0}
        for i, of_image in enumerate(boxes.values())
        for b in of_image
    ]
    crowd = {"image_id": 7, "bbox": [0, 0, 40, 24], "iscrowd": 1}
    content = {"images": images, "annotations": [*annotations, crowd]}
    (folder / "coco.json").write_text(json.dumps(content))
    return folder / "coco.json"


TRUE_BOXES = {"a.jpg": [[20, 0, 40, 12], [0, 0, 4, 4]], "sub/b.jpg": [[0, 4, 19, 16]]}


@pytest.mark.parametrize("save", [_save_xml, _save_json, _save_coco])
def test_boxes_score_as_those_of_the_masks(
    folders: tuple[Path, Path],
    weights: Path,
    tmp_path: Path,
    save: Callable[[Path, dict[str, list[list[int]]]], Path],
) -> None:
    images, _ = map(str, folders)
    boxes = save(tmp_path, TRUE_BOXES)
    for name, expected in TRUE_BOXES.items():
        found = find_boxes(str(boxes))(name)
        assert found is not None
        assert found.tolist() == expected
    report = _measured(weights, images, boxes=boxes, settings=WHOLE)
    assert report["score"] == {"corloc": 50.0}  # a crowd would be found
    assert report["floors"] == {"corloc": 0.0}
    exact = {"a.jpg": [[0, 0, 40, 24]], "sub/b.jpg": [[5, 4, 15, 12]]}
    save(tmp_path, exact)
    report = _measured(weights, images, boxes=save(tmp_path, exact), settings=WHOLE)
    assert report["score"] == {"corloc": 50.0}
    assert report["floors"] == {"corloc": 50.0}  # b's box is the centered one, up to a pixel


def test_images_without_boxes_are_left_out(
    folders: tuple[Path, Path], weights: Path, tmp_path: Path
) -> None:
    images, _ = map(str, folders)
    boxes = _save_json(tmp_path, {"a": [[0, 0, 40, 24]], "sub/b.jpg": []})
    report = _measured(weights, images, boxes=boxes, settings=WHOLE)
    assert (report["images"], report["score"]) == (1, {"corloc": 100.0})
    assert report["left_out"]["without_boxes"] == [f"{images}/sub/b.jpg"]
    with pytest.raises(DataError, match=r"none of 2 images can be scored: 2 have no box"):
        _measured(weights, images, boxes=_save_json(tmp_path, {}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a.jpg": [[5, 0, 5, 12]]}', r"a\.jpg: the box \[5.0, 0.0, 5.0, 12.0\] .* 40 x 24"),
        ('{"a.jpg": [[5, 0, 50, 12]]}', "is empty, or not on the image"),
        ('{"a.jpg": [[5, 0, 50]]}', "need COCO's images and annotations, or lists"),
        ('{"a.jpg": [[5, 0, 50, NaN]]}', "no finite number"),
        ('{"annotations": [{"image_id": 3, "bbox": [1, 1, 1, 1]}], "images": []}', "KeyError: 3"),
        ('{"annotations": 3}', "need COCO's images"),
        ("[1]", "need COCO's images"),
        ("{", "is not JSON"),
    ],
)
def test_wrong_boxes_are_refused(
    folders: tuple[Path, Path], weights: Path, tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "boxes.json"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        _measured(weights, str(folders[0]), boxes=file)


def test_wrong_annotations_and_masks_are_refused(
    folders: tuple[Path, Path], weights: Path, tmp_path: Path
) -> None:
    images, masks = map(str, folders)
    folder = _save_xml(tmp_path, TRUE_BOXES)
    for text, message in (
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><annotation/>", "declares a document type"),
        ("<annotation><object><bndbox/></object></annotation>", "no annotation of VOC"),
        ("<annotation>", "no annotation of VOC"),
    ):
        (folder / "a.xml").write_text(text)
        with pytest.raises(DataError, match=rf"a\.xml: .*{message}"):
            _measured(weights, images, boxes=folder)
    with pytest.raises(DataError, match="Name a folder of XML files or a JSON file"):
        _measured(weights, images, boxes=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="not both"):
        _measured(weights, images, boxes=folder, masks=masks)
    with pytest.raises(DataError, match=r"Name their folder with --masks"):
        _measured(weights, images)
    Image.new("L", (39, 24), 255).save(f"{masks}/a.png")
    with pytest.raises(DataError, match=r"a\.jpg.* 40 x 24 pixels, its mask 39 x 24"):
        _measured(weights, images, masks=masks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings("lost", tau=0.2), "tau: is a setting of the method tokencut, not of lost"),
        (Settings(expansion=3), "expansion: is a setting of the method lost"),
        (Settings(tau=1.5), "from -1 to 1, got 1.5"),
        (Settings("lost", expansion=0), "at least one patch, got 0"),
        (Settings("best"), "need one of tokencut, lost, got 'best'"),  # type: ignore[arg-type]  # wrong
        (Settings(features="values"), "need one of keys, patches"),  # type: ignore[arg-type]  # wrong
    ],
)
def test_settings_out_of_range_are_refused(weights: Path, settings: Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _measured(weights, "nowhere", settings=settings)


def test_a_damaged_image_is_left_out(folders: tuple[Path, Path], weights: Path) -> None:
    images, masks = map(str, folders)
    whole = Path(f"{images}/a.jpg").read_bytes()
    alone = _measured(weights, f"{images}/sub/b.jpg", masks=f"{masks}/sub")
    Path(f"{images}/a.jpg").write_bytes(whole[: len(whole) * 3 // 4])  # its header is intact
    report = _measured(weights, images, masks=masks)
    assert len(report["left_out"]["damaged"]) == 1
    assert (report["images"], report["score"]) == (1, alone["score"])


def test_the_command_writes_masks_boxes_and_a_sheet(
    folders: tuple[Path, Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = map(str, folders)
    out = tmp_path / "out"
    arguments = [str(weights), images, "--masks", masks, "--size", "32", "--features", "patches"]
    cli.run(["evaluate", "discover", *arguments, "--method", "lost", "--expansion", "4",
             "--out", str(out), "--untrained"])  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    settings = Settings("lost", "patches", expansion=4)
    same = _measured(weights, images, masks=masks, size=32, settings=settings)
    assert report["score"] == same["score"]
    assert report["made_from"]["input"].keys() == {"weights", "images", "masks"}
    assert report["protocol"]["expansion"] == 4
    assert (out / SHEET).stat().st_size > 2000
    entries = json.loads((out / BOXES).read_text())
    assert [entry["folder"] for entry in entries] == ["a", "b"]
    jaccard = [100 * entry["jaccard"] for entry in entries]
    assert np.mean(jaccard) == pytest.approx(report["score"]["jaccard"])
    for entry, size in zip(entries, ((40, 24), (19, 16)), strict=True):
        found = Image.open(io.BytesIO((out / entry["folder"] / "mask.png").read_bytes()))
        assert found.size == size
        left, top, right, bottom = np.round(entry["box"]).astype(int).tolist()
        assert np.asarray(found)[top:bottom, left:right].any()


def test_an_unreadable_image_with_boxes_is_left_out_with_a_warning(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_picture(tmp_path / "images" / "a.jpg", seed=0, size=(40, 24))
    (tmp_path / "images" / "b.jpg").write_bytes(b"no picture")
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({name: [[0, 0, 8, 8]] for name in ("a.jpg", "b.jpg")}))
    report = _measured(weights, tmp_path / "images", boxes=file)
    assert report["images"] == 1
    (unreadable,) = report["left_out"]["unreadable"]
    assert str(tmp_path / "images" / "b.jpg") in unreadable
    assert f"left out {unreadable}" in caplog.messages


def test_an_image_that_cannot_be_read_now_ends_the_measurement(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    images, masks = folders
    (images / "list.txt").write_text("a.jpg\ngone.jpg\n")
    source, fit = open_source(f"{images}/list.txt"), Fit(patch=8, size=16)
    boxes = _save_json(tmp_path, {"a.jpg": [[0, 0, 8, 8]], "gone.jpg": [[0, 0, 8, 8]]})
    for truth in (Annotations(masks=str(masks)), Annotations(boxes=str(boxes))):
        with pytest.raises(UnavailableError, match=r"gone\.jpg: cannot be read"):
            truth.find(source, f"{images}/list.txt", fit)
    with pytest.raises(UnavailableError, match=r"gone\.jpg: cannot be read"):
        list(FittedImages(source, fit, limit=None, progress=False))


def test_a_mask_that_has_vanished_since_the_start_is_named(folders: tuple[Path, Path]) -> None:
    images, masks = folders
    source = open_source(str(images))
    truth = Annotations(str(masks)).find(source, str(images), Fit(patch=8, size=16))
    (masks / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.jpg: its mask has vanished since the start"):
        truth.of(truth.indices[0])
