"""Retrieval by class and of landmarks, against scikit-learn and by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from dinoscale.errors import DataError
from dinoscale.evaluate.frozen_backbone import ExtractionOptions, LoadOptions
from dinoscale.evaluate.retrieval.ground_truth import Truth, read_ground_truth
from dinoscale.evaluate.retrieval.landmarks import evaluate_landmarks, score_setups
from dinoscale.evaluate.retrieval.multi_scale import MultiScale
from dinoscale.evaluate.retrieval.retrieve import evaluate_retrieve, score_labels
from tests.unit.evaluate.tiny_files import as_json, save_picture, save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors")


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
        save_picture(tmp_path / "ab"[i % 2] / f"{i}.png", seed=i)
    options = ExtractionOptions(num_workers=0, device="cpu", progress=False)
    report = as_json(evaluate_retrieve(weights, str(tmp_path), untrained=True, options=options))
    assert list(report["score"]) == list(report["floors"]) == list(report["untrained"])
    assert report["floors"]["P@5"] == pytest.approx(100 * 5 / 11)
    assert report["data"]["queries"] == 12
    few = evaluate_retrieve(weights, str(tmp_path), queries=3, multi_scale=True, options=options)
    assert few["data"] == {"spec": str(tmp_path), "images": 12, "left_out": {}, "queries": 3}


def test_one_class_only_is_refused(weights: Path, tmp_path: Path) -> None:
    for i in range(3):
        save_picture(tmp_path / "a" / f"{i}.png", seed=i)
    with pytest.raises(DataError, match="fewer than two classes"):
        evaluate_retrieve(weights, str(tmp_path), options=ExtractionOptions(num_workers=0))


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
        save_picture(root / "jpg" / f"image{i}.jpg", seed=i % 2, size=(60 + 8 * i, 50))
    save_picture(root / "jpg" / "query.jpg", seed=0, size=(300, 200))
    truth = {
        "imlist": [f"image{i}" for i in range(5)],
        "qimlist": ["query"],
        "gnd": [{"easy": [0, 2], "hard": [4], "junk": [1], "bbx": [1, 2, 3, 4]}],
    }
    (root / "gnd.json").write_text(json.dumps(truth))
    return root, root / "gnd.json"


def test_landmarks_are_measured_in_every_setup(weights: Path, tmp_path: Path) -> None:
    images, truth = _landmarks(tmp_path)
    options = LoadOptions(device="cpu", progress=False)
    settings: dict[str, Any] = {"size": 64, "options": options}
    for multi_scale in (False, True):
        report = as_json(
            evaluate_landmarks(weights, images, truth, multi_scale=multi_scale, **settings)
        )
        assert list(report["score"])[:2] == ["medium mAP", "medium mP@1"]
        assert report["score"]["medium mAP"] > report["floors"]["medium mAP"]
    with pytest.raises(DataError, match=r"is 12 x 10 pixels .* needs 16 along both sides"):
        evaluate_landmarks(weights, images, truth, multi_scale=True, size=12, options=options)
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
