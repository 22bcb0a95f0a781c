"""Video, retrieval and copies as whole measurements: files and a weights file in, a report out."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score

from dinoscale.cli import run
from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.data.decode import RGB
from dinoscale.data.videos import open_videos
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.copies import Settings as CopySettings
from dinoscale.evaluate.copies import evaluate_copies, evaluate_made_copies, score_copies
from dinoscale.evaluate.copy_descriptors import CopyDescriptor, generalized_mean, learn_whitening
from dinoscale.evaluate.copy_pairs import pairs_of_names
from dinoscale.evaluate.ground_truth import Truth, read_ground_truth
from dinoscale.evaluate.landmarks import evaluate_landmarks, score_setups
from dinoscale.evaluate.mask_scores import region_similarity
from dinoscale.evaluate.multi_scale import MultiScale
from dinoscale.evaluate.propagation import Settings
from dinoscale.evaluate.retrieve import evaluate_retrieve, score_labels
from dinoscale.evaluate.video import evaluate_video
from dinoscale.models.zoo import build_backbone

SHAPE = BackboneShape(
    "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2
)
CARD = BackboneCard(
    SHAPE, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), resize=32, crop=32, source="untrained"
)
QUICK = CopySettings(size=32, num_workers=0, device="cpu", progress=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("propagate") / "weights.safetensors"
    torch.manual_seed(1)
    save_backbone(path, build_backbone(**asdict(SHAPE)).state_dict(), CARD)
    return path


def _picture(path: Path, *, seed: int, size: tuple[int, int] = (40, 48)) -> Path:
    """Large spots of random colors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spots = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(spots).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


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


def _json(report: dict[str, object]) -> dict[str, Any]:
    loaded = json.loads(json.dumps(report, allow_nan=False))
    assert loaded == report
    return dict(loaded)


# --- video


def _evaluate_video(weights: Path, data: Path, **more: Any) -> dict[str, Any]:
    settings = Settings(size=64)
    return _json(
        evaluate_video(weights, str(data), settings=settings, device="cpu", progress=False, **more)
    )


def test_video_reports_scores_floor_and_writes_masks(weights: Path, tmp_path: Path) -> None:
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


def test_finished_videos_stay_when_a_later_one_fails(weights: Path, tmp_path: Path) -> None:
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


def test_names_of_sequences_do_not_lead_out_of_the_folder(weights: Path, tmp_path: Path) -> None:
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


# --- retrieval


def test_label_scores_equal_scikit_learn() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(30, 5), torch.arange(30) % 3
    found = score_labels(features, labels, torch.arange(30))
    similarity = F.cosine_similarity(features[:, None], features[None], dim=2).numpy()
    expected, first = [], []
    for i in range(30):
        others = np.delete(np.arange(30), i)
        same = labels.numpy()[others] == int(labels[i])
        expected.append(average_precision_score(same, similarity[i, others]))
        first.append(same[similarity[i, others].argmax()])
    assert found["mAP"] == pytest.approx(100 * np.mean(expected), abs=1e-4)
    assert found["P@1"] == pytest.approx(100 * np.mean(first))


def test_retrieve_reports_what_a_random_order_gives(weights: Path, tmp_path: Path) -> None:
    for i in range(12):
        _picture(tmp_path / "ab"[i % 2] / f"{i}.png", seed=i)
    settings: dict[str, Any] = {"num_workers": 0, "device": "cpu", "progress": False}
    report = _json(evaluate_retrieve(weights, str(tmp_path), untrained=True, **settings))
    assert list(report["score"]) == list(report["floors"]) == list(report["untrained"])
    assert report["floors"]["P@5"] == pytest.approx(100 * 5 / 11)
    assert report["data"]["queries"] == 12
    few = evaluate_retrieve(weights, str(tmp_path), queries=3, multi_scale=True, **settings)
    assert few["data"] == {"spec": str(tmp_path), "images": 12, "queries": 3}


def test_one_class_only_is_refused(weights: Path, tmp_path: Path) -> None:
    for i in range(3):
        _picture(tmp_path / "a" / f"{i}.png", seed=i)
    with pytest.raises(DataError, match="fewer than two classes"):
        evaluate_retrieve(weights, str(tmp_path), num_workers=0, progress=False)


def test_setups_of_landmarks_by_hand() -> None:
    """Ranking 4 0 3 1 2: easy 0, hard 1, junk 4 and 3."""
    order = np.array([[4, 0, 3, 1, 2]])
    found = score_setups(order, [Truth(easy=(0,), hard=(1,), junk=(3, 4))])
    assert found["medium mAP"] == pytest.approx(100)  # 0 1 2 is left
    assert found["hard mAP"] == pytest.approx(100)  # 1 2
    assert found["easy mAP"] == pytest.approx(100)  # 0 2
    found = score_setups(order, [Truth(easy=(0,), hard=(1,), junk=())])
    # Medium: ranks 2 and 4. (0 + 1/2) / 2 and (1/3 + 2/4) / 2, each of a recall of 1/2.
    assert found["medium mAP"] == pytest.approx(100 * (1 / 4 + 5 / 12) / 2)
    assert found["hard mAP"] == pytest.approx(100 * (0 + 1 / 3) / 2)  # 4 3 1: rank 3
    assert found["medium mP@1"] == 0
    assert found["medium mP@10"] == pytest.approx(50)  # two of the first four, the last hit
    assert "easy mAP" not in score_setups(order, [Truth(easy=(), hard=(1,), junk=())])


def _landmarks(root: Path) -> tuple[Path, Path]:
    for i in range(5):
        _picture(root / "jpg" / f"image{i}.jpg", seed=i % 2, size=(60 + 8 * i, 50))
    _picture(root / "jpg" / "query.jpg", seed=0, size=(300, 200))
    truth = {
        "imlist": [f"image{i}" for i in range(5)],
        "qimlist": ["query"],
        "gnd": [{"easy": [0, 2], "hard": [4], "junk": [1], "bbx": [1, 2, 3, 4]}],
    }
    (root / "gnd.json").write_text(json.dumps(truth))
    return root, root / "gnd.json"


def test_landmarks_are_measured_in_every_setup(weights: Path, tmp_path: Path) -> None:
    images, truth = _landmarks(tmp_path)
    settings: dict[str, Any] = {"size": 64, "device": "cpu", "progress": False}
    for multi_scale in (False, True):
        report = _json(
            evaluate_landmarks(weights, images, truth, multi_scale=multi_scale, **settings)
        )
        assert list(report["score"])[:2] == ["medium mAP", "medium mP@1"]
        assert report["score"]["medium mAP"] > report["floors"]["medium mAP"]
    (images / "jpg" / "image3.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 5 images .* the first is image3.jpg"):
        evaluate_landmarks(weights, images, truth, **settings)


def test_pickled_ground_truth_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps({"imlist": []}))
    with pytest.raises(DataError, match="is a pickle, which can run code"):
        read_ground_truth(tmp_path / "gnd.pkl")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"imlist": "a"}, "imlist must be a list"),
        ({"gnd": []}, "one entry for each"),
        ({"gnd": [{"easy": [0], "hard": [9], "junk": []}]}, r"gnd\[0\].hard .* 0 to 1"),
        ({"gnd": [{"easy": [0], "hard": [0], "junk": []}]}, "an image twice"),
        ({"gnd": [{"easy": [True], "hard": [], "junk": []}]}, r"gnd\[0\].easy"),
    ],
)
def test_ground_truth_of_another_layout_is_refused(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    content: dict[str, object] = {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": []}
    (tmp_path / "gnd.json").write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=says):
        read_ground_truth(tmp_path / "gnd.json")


def test_multi_scale_is_the_mean_of_three_sizes() -> None:
    class Width(torch.nn.Module):
        def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
            return torch.full((1, 1), float(crops[0].shape[-1]))

    found = MultiScale(Width())([torch.zeros(1, 3, 100, 200)])
    assert float(found) == pytest.approx((200 + 141 + 100) / 3)


# --- copies


def test_generalized_mean_by_hand() -> None:
    patches = torch.tensor([[[1.0, -3.0], [2.0, -1.0]]])  # (1, 2 patches, 2 channels)
    expected = [((1 + 16) / 2) ** 0.25, 1e-6]
    np.testing.assert_allclose(generalized_mean(patches)[0], expected, rtol=1e-5)


def test_whitening_equals_numpy_and_makes_second_moments_equal() -> None:
    rng = np.random.default_rng(0)
    descriptors = rng.normal(3, 1, (500, 4)) @ rng.normal(0, 1, (4, 4))
    whitening = learn_whitening(torch.from_numpy(descriptors))
    values, vectors = np.linalg.eigh(descriptors.T @ descriptors / 500)
    expected = (descriptors - descriptors.mean(0)) @ vectors / np.sqrt(values)
    found = whitening(torch.from_numpy(descriptors)).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-6, atol=1e-9)
    uncentered = (descriptors @ whitening.projection.numpy().T).T
    np.testing.assert_allclose(uncentered @ uncentered.T / 500, np.eye(4), atol=1e-6)


def test_directions_without_content_are_not_blown_up() -> None:
    flat = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([1.0, 1.0, 0.0])
    projection = learn_whitening(flat).projection
    largest = float(torch.linalg.eigvalsh(flat.T @ flat / 50).max())
    assert float(projection.abs().max()) == pytest.approx((1e-5 * largest) ** -0.5)


def test_descriptor_is_class_token_beside_pooled_patches() -> None:
    backbone = build_backbone(**asdict(SHAPE)).eval()
    images = torch.randn(2, 3, 32, 32)
    found = CopyDescriptor(backbone)([images])
    torch.testing.assert_close(found[:, :64], backbone([images]))
    tokens = backbone.features(images)  # type: ignore[operator]  # of a ViT
    torch.testing.assert_close(found[:, 64:], generalized_mean(tokens[:, 1:]))


def test_only_the_first_twenty_ranks_count() -> None:
    bank = torch.eye(30)
    query = torch.arange(30, 0, -1, dtype=torch.float32)[None]  # ranks 0, 1, 2, ...
    assert score_copies(query, bank, [[0]]) == 100
    assert score_copies(query, bank, [[19]]) == pytest.approx(100 * (0 + 1 / 20) / 2)
    assert score_copies(query, bank, [[20]]) == 0


def test_copies_of_a_folder_are_found_block_by_block(weights: Path, tmp_path: Path) -> None:
    for i in range(6):
        _picture(tmp_path / "original" / f"p{i}.png", seed=i)
        _picture(tmp_path / "query" / "strong" / f"p{i}_cut.jpg", seed=i, size=(60, 30))
        _picture(tmp_path / "query" / "jpegqual" / "3" / f"p{i}.jpg", seed=5 - i)  # of another
        _picture(tmp_path / "other" / f"{i}.png", seed=50 + i)
    places = (str(tmp_path / "original"), str(tmp_path / "query"))
    other = str(tmp_path / "other")
    report = _json(evaluate_copies(weights, *places, distractors=other, settings=QUICK))
    assert report["score"]["mAP"] == report["score"]["mAP strong"] > 80
    assert report["score"]["mAP jpegqual/3"] < 40
    assert report["data"]["database"] == 12
    rank = np.arange(2, 13)
    assert report["floors"]["mAP"] == pytest.approx(100 / 12 * (1 + (1 / rank / 2).sum()))
    (tmp_path / "pairs.csv").write_text(
        "query,original\n"
        + "".join(f"jpegqual/3/p{i}.jpg,p{5 - i}.png\n" for i in range(6))
        + "".join(f"strong/p{i}_cut.jpg,p{i}.png\n" for i in range(6))
    )
    paired = evaluate_copies(weights, *places, pairs=str(tmp_path / "pairs.csv"), settings=QUICK)
    assert _json(paired)["score"]["mAP jpegqual/3"] > 80
    (tmp_path / "original" / "p3.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"p3.png"):
        evaluate_copies(weights, *places, settings=QUICK)


def test_queries_belong_to_the_longest_name_they_begin_with() -> None:
    assert pairs_of_names(["x/sea_2_cut.jpg", "sea_1.png"], ["sea.jpg", "sea_2.jpg"]) == [
        (1,),
        (0,),
    ]
    with pytest.raises(DataError, match=r"200001.jpg .*--prefix 4"):
        pairs_of_names(["200001.jpg"], ["200000.jpg"])


def test_made_copies_are_the_same_every_time_and_better_whitened(
    weights: Path, tmp_path: Path
) -> None:
    for i in range(20):
        _picture(tmp_path / f"{i}.png", seed=i)
    whitened = CopySettings(**{**asdict(QUICK), "whitening": str(tmp_path), "untrained": True})
    first, second = (
        _json(evaluate_made_copies(weights, str(tmp_path), queries=8, settings=whitened))
        for _ in range(2)
    )
    assert first == second
    assert first["data"]["queries"]["strong"] == 8
    assert first["score"]["mAP jpeg"] > first["floors"]["mAP jpeg"]
    assert list(first["untrained"]) == list(first["score"])
    other = evaluate_made_copies(weights, str(tmp_path), queries=8, seed=1, settings=whitened)
    assert other["score"] != first["score"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["retrieve", "w"], "give --data DATA, or --images"),
        (["retrieve", "w", "--data", "d", "--imsize", "9"], "--imsize has no meaning beside"),
        (["retrieve", "w", "--images", "d"], "--ground-truth"),
        (["copies", "w"], "give --originals and --queries"),
        (["copies", "w", "--data", "d", "--make-copies", "--prefix", "4"], "--prefix has no"),
        (["copies", "w", "--originals", "o", "--queries", "q", "--seed", "1"], "--seed has no"),
    ],
)
def test_options_of_different_ways_are_not_mixed(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(["evaluate", *arguments])
