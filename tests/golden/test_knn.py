"""The weighted k-NN agrees with the reference implementation, exactly."""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dinoscale.evaluate.classification.knn import knn_accuracy

GOLDEN = Path(os.environ.get("DINOSCALE_GOLDEN", Path(__file__).parent))
RECORDED = load_file(GOLDEN / "knn.safetensors")
KS = sorted(int(name.removeprefix("top1_top5_k")) for name in RECORDED if "top1_top5" in name)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 1000])
def test_knn_equals_the_reference_for_every_k(chunk_size: int | None) -> None:
    found = knn_accuracy(
        RECORDED["train_features"],
        RECORDED["train_labels"],
        RECORDED["test_features"],
        RECORDED["test_labels"],
        ks=KS,
        chunk_size=chunk_size,
    )
    assert KS
    for k in KS:
        top1, top5 = RECORDED[f"top1_top5_k{k}"].tolist()
        assert found[k].top1 == pytest.approx(top1, abs=1e-4)
        assert found[k].top5 == pytest.approx(top5, abs=1e-4)
