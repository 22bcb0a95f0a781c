"""What k-NN during training measures, where that is easily mistaken."""

import pytest

from dinoscale.config import load_config
from dinoscale.training.hooks.online_knn import drawn_images_caution


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
