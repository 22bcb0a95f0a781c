"""Copy detection: descriptors and whitening by hand, folders of copies, generated copies."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinoscale.cli import run
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.evaluate.retrieval.copies import Settings as CopySettings
from dinoscale.evaluate.retrieval.copies import evaluate_copies, evaluate_made_copies, score_copies
from dinoscale.evaluate.retrieval.copy_descriptors import (
    CopyDescriptor,
    generalized_mean,
    learn_whitening,
)
from dinoscale.evaluate.retrieval.copy_pairs import pairs_of_names, pairs_of_prefix
from dinoscale.models.zoo import build_backbone
from dinoscale.planning.bench.tensor_memory import with_peak_bytes
from tests.unit.evaluate.tiny_files import SHAPE, as_json, save_picture, save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors")


OPTIONS = ExtractionOptions(num_workers=0, device="cpu", progress=False)
QUICK: dict[str, Any] = {"settings": CopySettings(size=32), "options": OPTIONS}


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


def test_directions_without_variance_are_not_amplified() -> None:
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


def test_memory_does_not_grow_with_queries_and_bank() -> None:
    bank, queries = torch.randn(20_000, 8), torch.randn(6_000, 8)
    _, bytes_before = with_peak_bytes(lambda: None)
    right = [(number,) for number in range(len(queries))]
    _, peak = with_peak_bytes(lambda: score_copies(queries, bank, right))
    assert peak - bytes_before < 0.5 * 4 * len(bank) * len(queries)


def test_copies_of_a_folder_are_found_block_by_block(weights: Path, tmp_path: Path) -> None:
    for i in range(6):
        save_picture(tmp_path / "original" / f"p{i}.png", seed=i)
        save_picture(tmp_path / "query" / "strong" / f"p{i}_cut.jpg", seed=i, size=(60, 30))
        save_picture(tmp_path / "query" / "jpegqual" / "3" / f"p{i}.jpg", seed=5 - i)  # of another
        save_picture(tmp_path / "other" / f"{i}.png", seed=50 + i)
    (tmp_path / "query" / "more.tar").write_bytes(b"")
    places = (str(tmp_path / "original"), str(tmp_path / "query"))
    other = str(tmp_path / "other")
    report = as_json(evaluate_copies(weights, *places, distractors=other, **QUICK))
    assert report["score"]["mAP"] == report["score"]["mAP strong"] > 80
    assert report["score"]["mAP jpegqual/3"] < 40
    assert report["data"]["database"] == 12
    assert report["data"]["left_out"] == {"originals": {}, "queries": {"tar": 1}, "distractors": {}}
    rank = np.arange(2, 13)
    assert report["floors"]["mAP"] == pytest.approx(100 / 12 * (1 + (1 / rank / 2).sum()))
    (tmp_path / "pairs.csv").write_text(
        "query,original\n"
        + "".join(f"jpegqual/3/p{i}.jpg,p{5 - i}.png\n" for i in range(6))
        + "".join(f"strong/p{i}_cut.jpg,p{i}.png\n" for i in range(6))
    )
    paired = evaluate_copies(weights, *places, pairs=str(tmp_path / "pairs.csv"), **QUICK)
    assert as_json(paired)["score"]["mAP jpegqual/3"] > 80
    (tmp_path / "original" / "p3.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"p3.png"):
        evaluate_copies(weights, *places, **QUICK)


def test_originals_among_the_distractors_are_left_out_and_logged(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(4):
        save_picture(tmp_path / "original" / f"p{i}.png", seed=i)
        save_picture(tmp_path / "query" / f"p{i}.jpg", seed=i)
    for i in range(6):
        save_picture(tmp_path / "other" / f"{i}.png", seed=50 + i)
    (tmp_path / "original" / "p3.png").write_bytes((tmp_path / "original" / "p2.png").read_bytes())
    places = (str(tmp_path / "original"), str(tmp_path / "query"))
    distractors = str(tmp_path / "other")
    before = as_json(evaluate_copies(weights, *places, distractors=distractors, **QUICK))
    assert before["data"]["same_as_asked_for"] == 1  # p3, which is p2
    for i in range(4):
        for folder, name in (("original", f"p{i}.png"), ("query", f"p{i}.jpg")):
            twin = tmp_path / "other" / "more" / f"{folder}-{i}.png"
            twin.parent.mkdir(exist_ok=True)
            twin.write_bytes((tmp_path / folder / name).read_bytes())
    after = as_json(evaluate_copies(weights, *places, distractors=distractors, **QUICK))
    assert after["score"] == before["score"]
    assert after["data"]["database"] == before["data"]["database"] == 9
    assert "9 pictures of the database are left out" in caplog.text


def test_duplicate_pictures_do_not_lower_the_score_of_made_copies(
    weights: Path, tmp_path: Path
) -> None:
    for i in range(6):
        for folder in ("a", "b"):
            save_picture(tmp_path / folder / f"{i}.png", seed=i)
    made = [
        as_json(evaluate_made_copies(weights, str(folder), queries=6, **QUICK))
        for folder in (tmp_path, tmp_path / "a")
    ]
    assert [report["data"]["database"] for report in made] == [
        12 - made[0]["data"]["same_as_asked_for"],
        6,
    ]
    assert made[0]["score"]["mAP jpeg"] == 100 == made[1]["score"]["mAP jpeg"]


def test_queries_belong_to_the_longest_name_they_begin_with() -> None:
    assert pairs_of_names(["x/sea_2_cut.jpg", "sea_1.png"], ["sea.jpg", "sea_2.jpg"]) == [
        (1,),
        (0,),
    ]
    assert pairs_of_names(["img1-x.jpg", "img10.x.jpg"], ["img1.jpg", "img10.jpg"]) == [(0,), (1,)]
    for query in ("200001.jpg", "seal_crop.png", "sea2.png"):
        with pytest.raises(DataError, match=rf"{query} .*--prefix 4"):
            pairs_of_names([query], ["200000.jpg", "sea.jpg"])


def test_names_shorter_than_the_prefix_are_compared_without_their_extension() -> None:
    assert pairs_of_prefix(4, ["ab.png", "abcd1.png"], ["ab.jpg", "abcd2.jpg"]) == [(0,), (1,)]


def test_made_copies_are_the_same_every_time_and_with_whitening(
    weights: Path, tmp_path: Path
) -> None:
    for i in range(20):
        save_picture(tmp_path / f"{i}.png", seed=i)
    settings = CopySettings(size=32, whitening=str(tmp_path), untrained=True)
    whitened: dict[str, Any] = {"settings": settings, "options": OPTIONS}
    first, second = (
        as_json(evaluate_made_copies(weights, str(tmp_path), queries=8, **whitened))
        for _ in range(2)
    )
    assert first == second
    assert first["data"]["queries"]["strong"] == 8
    assert first["score"]["mAP jpeg"] > first["floors"]["mAP jpeg"]
    assert list(first["untrained"]) == list(first["score"])
    other = evaluate_made_copies(weights, str(tmp_path), queries=8, seed=1, **whitened)
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
def test_options_of_different_modes_are_refused_together(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(["evaluate", *arguments])
