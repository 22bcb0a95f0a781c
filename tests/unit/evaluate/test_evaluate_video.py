"""Video object segmentation end to end: videos in, a report and masks out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoscale.data.decoding.decode import RGB
from dinoscale.data.sources.videos import open_videos
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.dense.mask_scores import region_similarity
from dinoscale.evaluate.frozen_backbone import LoadOptions
from dinoscale.evaluate.video.davis import evaluate_video
from dinoscale.evaluate.video.propagation import Settings
from tests.unit.evaluate.tiny_files import as_json, save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors")


def _video(root: Path, name: str, *, frames: int = 5) -> Path:
    (root / name).mkdir(parents=True)
    for i in range(frames):
        pixels = np.full((64, 96, 3), 60, dtype=np.uint8)
        mask = np.zeros((64, 96), dtype=np.uint8)
        for number, top in ((1, 8), (2, 40)):
            part = np.s_[top : top + 16, 8 + 4 * i : 24 + 4 * i]
            pixels[part], mask[part] = (220, 100 * number, 20), number
        Image.fromarray(pixels).save(root / name / f"{i:05d}.png")
        Image.fromarray(mask).save(root / name / f"{i:05d}.mask.png")
    return root


def _evaluate_video(weights: Path, data: Path, **more: Any) -> dict[str, Any]:
    settings, options = Settings(size=64), LoadOptions(device="cpu", progress=False)
    return as_json(evaluate_video(weights, str(data), settings=settings, options=options, **more))


def test_video_reports_scores_and_baseline_and_writes_masks(weights: Path, tmp_path: Path) -> None:
    data, out = _video(tmp_path / "data", "a"), tmp_path / "out"
    report = _evaluate_video(weights, data, out=out, untrained=True)
    (sequence,) = report["sequences"]
    assert (sequence["frames"], sequence["scored_frames"], sequence["objects"]) == (5, 3, [1, 2])
    # Squares of 16 moved by 4, 8 and 12 pixels against their first place.
    copied = 100 * np.mean([(16 - move) / (16 + move) for move in (4, 8, 12)])
    assert report["floors"]["J"] == pytest.approx(copied)
    for scores in (report["score"], report["floors"], report["untrained"]):
        assert list(scores) == ["J&F", "J", "F"]
        assert scores["J&F"] == pytest.approx((scores["J"] + scores["F"]) / 2)
    assert json.loads((out / "a" / "scores.json").read_text()) == sequence
    names = sorted(path.name for path in (out / "a").glob("*.png"))
    assert names == [f"{i:05d}.png" for i in range(5)]
    with Image.open(out / "a" / "00000.png") as first, Image.open(out / "a.gif") as animation:
        assert first.mode == "P"
        truth = Image.open(data / "a" / "00000.mask.png")
        assert np.array_equal(np.asarray(first), np.asarray(truth))
        assert animation.n_frames == 5


def test_files_of_finished_videos_stay_when_a_later_one_fails(
    weights: Path, tmp_path: Path
) -> None:
    data = _video(_video(tmp_path / "data", "a"), "b")
    Image.new("L", (7, 7)).save(data / "b" / "00003.mask.png")
    with pytest.raises(DataError, match=r"b/00003.mask.png: the mask has 7 x 7 pixels"):
        _evaluate_video(weights, data, out=tmp_path / "out")
    assert (tmp_path / "out" / "a" / "scores.json").exists()
    assert not (tmp_path / "out" / "b" / "scores.json").exists()


def test_videos_with_first_masks_only_are_written_but_not_scored(
    weights: Path, tmp_path: Path
) -> None:
    data = _video(tmp_path / "data", "a", frames=3)
    for i in (1, 2):
        (data / "a" / f"{i:05d}.mask.png").unlink()
    with pytest.raises(DataError, match="only the first frames have masks"):
        _evaluate_video(weights, data)
    assert _evaluate_video(weights, data, out=tmp_path / "out")["score"] == {}
    assert (tmp_path / "out" / "a" / "00002.png").exists()


def test_names_of_sequences_do_not_escape_the_folder(weights: Path, tmp_path: Path) -> None:
    import tarfile

    data = _video(tmp_path / "data", "a", frames=3)
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.add(data / "a", arcname="../../evil")
    _evaluate_video(weights, tmp_path / "evil.tar", out=tmp_path / "one" / "out")
    assert sorted(os.listdir(tmp_path / "one")) == ["out"]
    assert not (tmp_path / "evil").exists()


def test_video_settings_out_of_range_are_refused(weights: Path) -> None:
    for wrong in ({"radius": 0}, {"top": 0}, {"temp": 0.0}, {"context": -1}, {"size": 0}):
        with pytest.raises(ConfigError, match="radius, top, temp"):
            evaluate_video(weights, "nowhere", settings=Settings(**wrong))


@pytest.mark.skipif("DINOSCALE_TEST_DATA" not in os.environ, reason="needs the DAVIS sequences")
@pytest.mark.parametrize(("name", "percent"), [("car-shadow", 40.4), ("motocross-jump", 15.0)])
def test_the_copied_first_mask_of_davis_scores_what_is_known(name: str, percent: float) -> None:
    """Known over all later frames; the benchmark leaves out the last."""
    (video,) = open_videos(f"{os.environ['DINOSCALE_TEST_DATA']}/davis-video/{name}.tar")
    height, width = video.pixels(0, RGB).shape[:2]
    masks = [video.mask(i, size=(height, width)) for i in range(len(video.frames))]
    found = [region_similarity(masks[0] == 1, mask == 1) for mask in masks[1:]]
    assert round(100 * float(np.mean(found)), 1) == percent
