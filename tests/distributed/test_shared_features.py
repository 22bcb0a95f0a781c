"""Features and neighbours computed on several ranks equal those of one process bit for bit."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoscale.data.decoding.decode import BadSampleError, Picture
from dinoscale.errors import DataError, RunFailedError
from dinoscale.evaluate.classification.answers import Details
from dinoscale.evaluate.classification.knn import KnnResult, knn_accuracy
from dinoscale.evaluate.classification.linear import evaluate_linear
from dinoscale.evaluate.classification.linear_protocols import GridProtocol
from dinoscale.evaluate.classification.logistic import evaluate_logistic
from dinoscale.evaluate.features import extract_features, pixel_features
from dinoscale.evaluate.finished_items import FinishedItems, Form
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.evaluate.retrieval.copies import Settings as CopySettings
from dinoscale.evaluate.retrieval.copies import evaluate_made_copies
from dinoscale.evaluate.retrieval.retrieve import evaluate_retrieve
from dinoscale.models.zoo import build_backbone
from tests.harness import run_distributed
from tests.unit.evaluate.tiny_files import save_weights

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

BATCH = 8
BROKEN = (3, 50, *range(88, 96))  # the last ones are a whole batch
KS = (1, 7)


class Noise:
    """Image i is noise drawn from i."""

    class_names = None

    def __init__(self, n: int, *, broken: tuple[int, ...] = (), fails_at: int = -1) -> None:
        self.labels: NDArray[np.int64] = np.arange(n) % 3
        self._broken, self._fails_at = broken, fails_at
        self.delay_s, self.read = 0.0, 0

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return f"noise-{index}"

    def picture(self, index: int) -> Picture:
        time.sleep(self.delay_s)
        self.read += 1
        if index == self._fails_at:
            raise DataError(f"{self.path(index)}: the disk is gone")
        if index in self._broken:
            raise BadSampleError(self.path(index), "on purpose")
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), np.uint8)
        return Picture.of(pixels, self.path(index))


def _extract(source: Noise) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    return extract_features(
        build_backbone("vit_tiny_patch16_224", img_size=16, **sizes),
        source,
        resize=18,
        crop=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        batch_size=BATCH,
        device="cpu",
        num_workers=0,
    )


def measure() -> dict[str, tuple[Tensor, Tensor]]:
    """Features and labels of every set, pixels, and neighbours' accuracy as a tensor."""
    torch.set_num_threads(1)
    found = {
        "101": _extract(Noise(101, broken=BROKEN)),
        "one batch": _extract(Noise(5)),
        "unreadable": _extract(Noise(4, broken=(0, 1, 2, 3))),
        "pixels": pixel_features(Noise(37, broken=BROKEN), batch_size=BATCH),
    }
    bank, labels = found["101"]
    for chunk in (7, 1000):  # the last leaves nothing to the other ranks
        shares = {"ks": KS, "chunk_size": chunk, "bank_chunk_size": 30}
        by_k = knn_accuracy(bank[::2], labels[::2], bank[1::2], labels[1::2], **shares)  # type: ignore[arg-type]  # several types
        found[f"knn {chunk}"] = (_top1(by_k), labels)
    return found


def _top1(by_k: dict[int, KnnResult]) -> Tensor:
    return torch.tensor([(by_k[k].top1, by_k[k].top5) for k in KS], dtype=torch.float64)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_what_one_process_gets(world_size: int) -> None:
    threads = torch.get_num_threads()
    alone = measure()
    torch.set_num_threads(threads)
    assert len(alone["101"][0]) == 101 - len(BROKEN)
    assert 0 < alone["knn 7"][0][0, 0] < 100
    for of_rank in run_distributed(
        "tests.distributed.test_shared_features:measure", world_size=world_size, timeout_s=120
    ):
        for name, (rows, labels) in alone.items():
            assert torch.equal(of_rank[name][0], rows), name
            assert torch.equal(of_rank[name][1], labels), name


def tasks(weights: str) -> dict[str, str]:
    """Reports of tasks whose extraction is shared; rank 0 alone trains."""
    torch.set_num_threads(1)
    sets = [f"synthetic:shapes?images=41&size=16&split={split}" for split in ("train", "test")]
    options = ExtractionOptions(num_workers=0, batch_size=BATCH, progress=False, device="cpu")
    how = {"untrained": True, "details": Details(per_class=True), "options": options}
    grid = GridProtocol(iterations=3, batch_size=8)
    sizes = CopySettings(size=16)
    reports = {
        "retrieve": evaluate_retrieve(weights, sets[1], options=options),
        "copies": evaluate_made_copies(
            weights, sets[1], queries=5, settings=sizes, options=options
        ),
        "logistic": evaluate_logistic(weights, *sets, cs=(1.0, 10.0), **how),  # type: ignore[arg-type]  # several types
        "linear": evaluate_linear(weights, *sets, protocol=grid, augment=False, **how),  # type: ignore[arg-type]  # several types
    }
    return {name: json.dumps(report) for name, report in reports.items()}


def test_tasks_on_two_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    weights = save_weights(tmp_path / "weights.safetensors")
    threads = torch.get_num_threads()
    alone = tasks(str(weights))
    torch.set_num_threads(threads)
    for of_rank in run_distributed(
        "tests.distributed.test_shared_features:tasks",
        world_size=2,
        timeout_s=120,
        weights=str(weights),
    ):
        assert of_rank == alone


def fail_on_rank_1() -> tuple[str, int]:
    """The error of each rank, and after how many images; rank 0 has 800 to do, a minute's work."""
    from dinoscale.runtime.distributed import rank

    source = Noise(1600, fails_at=3 * BATCH + 1)  # in the second batch of rank 1
    source.delay_s = 0.01 if rank() == 1 else 0.075
    try:
        _extract(source)
    except DataError as error:
        return str(error), source.read
    return "", source.read


def test_an_error_on_one_rank_ends_all_amid_their_work() -> None:
    (first, read), (second, _) = run_distributed(
        "tests.distributed.test_shared_features:fail_on_rank_1", world_size=2, timeout_s=120
    )
    assert first == "rank 1: noise-25: the disk is gone"
    assert second == "noise-25: the disk is gone"
    assert read < 400  # half of them; two batches of 8 on an idle machine


def cached(folder: str) -> tuple[Tensor, int]:
    """Features of a folder by a network on every rank, and how often it was called here."""
    from dinoscale.data.sources.folder import FolderSource
    from tests.unit.evaluate.test_feature_cache import Counted

    backbone = Counted()
    preparation = {"resize": 8, "crop": 8, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    features, _ = extract_features(
        backbone,
        FolderSource(folder),
        **preparation,  # type: ignore[arg-type]  # several types
        batch_size=1,
        device="cpu",
        num_workers=0,
        output_key="mean",
    )
    return features, backbone.calls


def test_all_ranks_read_the_features_that_one_process_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setenv("DINOSCALE_CACHE", str(tmp_path / "cache"))
    for i in range(3):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * i, 0, 9)).save(path)
    folder = str(tmp_path / "images")
    features, calls = cached(folder)
    assert calls == 3
    for of_rank, calls in run_distributed(
        "tests.distributed.test_shared_features:cached", folder=folder, world_size=2, timeout_s=120
    ):
        assert calls == 0
        assert torch.equal(of_rank, features)


def read_by_mistake(cache: str) -> str:
    """The error of a rank where reading kept results fails on the first one."""

    def fails(_: object) -> str:
        raise RuntimeError("a mistake")

    os.environ["DINOSCALE_CACHE"] = cache
    kept = FinishedItems({"input": {"data": {"number": 2}}}, torch.device("cpu"))
    assert kept.each([0, 1], str, Form(str, str)) == ["0", "1"]
    with pytest.raises((RuntimeError, RunFailedError)) as caught:
        kept.each([0, 1], str, Form(str, fails))
    return str(caught.value)


def test_an_error_while_reading_kept_results_ends_all_ranks(tmp_path: Path) -> None:
    errors = run_distributed(
        "tests.distributed.test_shared_features:read_by_mistake",
        world_size=2,
        timeout_s=60,
        cache=str(tmp_path),
    )
    assert errors == ["a mistake", "rank 0: RuntimeError: a mistake"]
