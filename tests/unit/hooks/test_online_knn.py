"""What k-NN during training measures, where that is easily mistaken."""

from pathlib import Path

import pytest
import torch

from dinoscale.config import load_config
from dinoscale.data.sources.source import open_source
from dinoscale.evaluate.features import extract_features
from dinoscale.evaluate.label_free.spectrum import rankme
from dinoscale.training.hooks.online_knn import OnlineKnn, drawn_images_caution


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ([], False),  # the quickstart itself draws all sets
        (["data.train=/data/images"], True),
        (["data.train=/data/images", "eval.train=null", "eval.test=null"], False),
        (["data.train=/data/images", "eval.train=/data/a", "eval.test=/data/b"], False),
    ],
)
def test_knn_of_drawn_images_by_a_network_of_others_is_said(
    settings: list[str], warns: bool
) -> None:
    said = drawn_images_caution(load_config("quickstart", settings))
    assert ("eval.train is synthetic:shapes" in (said or "")) == warns == (said is not None)


def test_rankme_is_that_of_the_train_features(tmp_path: Path) -> None:
    sets = [f"synthetic:shapes?images=24&size=16&split={split}" for split in ("train", "test")]
    settings = [f"run_dir={tmp_path}", "data.num_workers=0", "eval.k=5", "eval.resize=16"]
    settings += [f"eval.train={sets[0]}", f"eval.test={sets[1]}", "eval.crop=16"]
    config = load_config("quickstart", settings)
    passes = []

    class Pooled(torch.nn.Module):
        """The mean of each channel in each quarter of an image, (N, 12)."""

        embed_dim = 12

        def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
            passes.append(len(crops[0]))
            return torch.nn.functional.adaptive_avg_pool2d(crops[0], 2).flatten(1)

    device = torch.device("cpu")
    found = OnlineKnn(config).measure(Pooled(), device, lambda: None)
    assert sum(passes) == 48  # each image once
    data = config.data
    features, _ = extract_features(
        Pooled(), open_source(sets[0]), resize=16, crop=16, mean=data.mean, std=data.std,
        batch_size=config.eval.batch_size, device=device, num_workers=0,
    )  # fmt: skip
    assert found.rankme == rankme(features)
    assert 1 < found.rankme < 12
    assert 0 < found.top1 <= 100
