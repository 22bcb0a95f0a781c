"""The benchmark of the input pipeline runs; what it measures is not asserted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale.errors import DataError
from tests.benchmarks import input as benchmark
from tests.reference_input import ReferenceCrops, load


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((160, 120)).save(folder / f"{i}.jpg")
    return folder


def test_every_part_has_a_rate_and_the_reference_is_in_every_ratio_but_one(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(f"--images {images} --num-images 2 --repeats 2 --local-crops 1 --as-is".split())
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["images"] == 2
    assert len(result["images_per_s"]) == 7
    assert len(result["ratios"]) == 4
    for row in (*result["images_per_s"].values(), *result["ratios"].values()):
        assert 0 < row["min"] <= row["median"] <= row["max"] < 1e6
    assert "worker part / reference" in printed.err


def test_small_pictures_are_enlarged_to_the_pixels_of_imagenets(images: Path) -> None:
    (data,) = benchmark.read_images(str(images), num_images=1, as_is=False).files
    assert load(data).size == (500, 375)
    (data,) = benchmark.read_images(str(images), num_images=1, as_is=True).files
    assert data == (images / "0.jpg").read_bytes()


def test_drawn_images_are_refused() -> None:
    with pytest.raises(DataError, match="need image files"):
        benchmark.read_images("synthetic:shapes?images=4", num_images=1, as_is=True)


def test_the_reference_cuts_two_large_and_n_small_crops(images: Path) -> None:
    torch.manual_seed(0)
    crops = ReferenceCrops(num_local=3)(load((images / "1.jpg").read_bytes()))
    assert [tuple(crop.shape) for crop in crops] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 3
    assert all(-2.2 < float(crop.min()) < float(crop.max()) < 2.7 for crop in crops)
