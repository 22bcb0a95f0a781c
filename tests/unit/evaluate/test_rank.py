"""RankMe, alpha-ReQ and LiDAR: of features with a known spectrum, and of a tiny network."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dinoscale.data.augmentation.multi_crop import MultiCrop
from dinoscale.data.sources.source import open_source
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.frozen_backbone import ExtractionOptions, load_extractor
from dinoscale.evaluate.label_free import spectrum
from dinoscale.evaluate.label_free.rank import Samples, evaluate_rank
from dinoscale.evaluate.label_free.spectrum import alpha_req, lidar, rankme
from dinoscale.evaluate.label_free.views import SEED, augmented_views
from tests.unit.evaluate.tiny_files import as_json, save_picture, save_weights

OPTIONS = ExtractionOptions(num_workers=0, progress=False, cache=False)
SQUARES = (4.0, 2.0, 1.0, 1.0)  # shares 1/2, 1/4, 1/8, 1/8: an entropy of 1.75 ln 2


def _orthonormal(rows: int, columns: int, *, centered: bool = False) -> Tensor:
    """Columns of length 1, at right angles; with `centered`, each has the mean 0."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).double()
    return torch.linalg.qr(noise - noise.mean(0) * centered).Q


def _with_spectrum(values: Tensor, *, rows: int, columns: int, centered: bool = False) -> Tensor:
    left = _orthonormal(rows, len(values), centered=centered)
    return left * values.double() @ _orthonormal(columns, len(values)).T


@pytest.mark.parametrize(("rows", "columns"), [(40, 7), (7, 40), (4, 4)])
def test_rankme_of_known_singular_values(rows: int, columns: int) -> None:
    features = _with_spectrum(torch.tensor(SQUARES), rows=rows, columns=columns)
    assert rankme(features) == pytest.approx(2**1.75, rel=1e-12)
    assert rankme(1e-3 * features) == pytest.approx(2**1.75, rel=1e-12)
    assert rankme(features.float()) == pytest.approx(2**1.75, rel=1e-4)
    equal = _with_spectrum(torch.ones(3), rows=rows, columns=columns)
    assert rankme(equal) == pytest.approx(3, rel=1e-12)


def test_rankme_of_degenerate_features() -> None:
    assert rankme(torch.full((9, 5), 0.3)) == pytest.approx(1, rel=1e-9)
    assert rankme(torch.tensor([[0.1, -2.0, 3.0]])) == pytest.approx(1, rel=1e-12)
    assert rankme(torch.zeros(9, 5)) == 0
    with pytest.raises(ValueError, match="need features"):
        rankme(torch.zeros(0, 5))
    with pytest.raises(ValueError, match="not finite"):
        rankme(torch.tensor([[1.0, torch.nan]]))


@pytest.mark.parametrize("decay", [0.5, 1.3])
def test_alpha_of_a_spectrum_that_follows_the_law(decay: float) -> None:
    eigenvalues = torch.arange(1, 151).double() ** -decay
    features = _with_spectrum(eigenvalues.sqrt(), rows=400, columns=160, centered=True)
    assert alpha_req(features + 5) == pytest.approx(decay, rel=1e-9)  # it is centered
    tail = torch.cat((eigenvalues[:100], torch.full((50,), 1e-6)))  # beyond the range
    head = torch.cat((torch.full((9,), 50.0), tail[9:]))
    other = _with_spectrum(head.sqrt(), rows=400, columns=160, centered=True)
    assert alpha_req(other) == pytest.approx(decay, rel=1e-9)


def test_alpha_needs_ten_eigenvalues_from_the_tenth_on() -> None:
    values = torch.arange(1, 20).double() ** -0.5
    assert alpha_req(_with_spectrum(values, rows=50, columns=30, centered=True)) is not None
    fewer = _with_spectrum(values[:18], rows=50, columns=30, centered=True)
    assert alpha_req(fewer) is None
    assert alpha_req(torch.full((50, 30), 0.3)) is None
    assert alpha_req(torch.randn(15, 30)) is None  # fewer images than that


def _views(squares: tuple[float, ...], noise: Tensor) -> Tensor:
    """Images at +-a_k on axis k, views at +-noise_d on axis d around them: (2 K, 2 D, D).

    S_b has a_k^2 / K on its diagonal, S_w noise_d^2 / D.
    """
    width, axes = len(noise), torch.eye(len(noise)).double()
    means = torch.cat([sign * a**0.5 * axes[k] for k, a in enumerate(squares) for sign in (1, -1)])
    shifts = torch.cat((torch.diag(noise), -torch.diag(noise)))
    return means.view(-1, 1, width) + shifts


def test_lidar_of_known_covariances() -> None:
    even = _views(SQUARES, torch.full((6,), 0.7).double())
    for delta in (1e-4, 0.3):
        assert lidar(even + 3, delta=delta) == pytest.approx(2**1.75, rel=1e-9)
    delta = 0.25
    # lambda_k = (a_k^2 / 4) / (noise_k^2 / 6 + delta), the same for all four
    noise = (6 * (torch.tensor([*SQUARES, 3.0, 9.0]).double() - delta)).sqrt()
    assert lidar(_views(SQUARES, noise), delta=delta) == pytest.approx(4, rel=1e-9)
    turned = _views(SQUARES, noise) @ _orthonormal(6, 6)
    assert lidar(turned, delta=delta) == pytest.approx(4, rel=1e-9)


def test_lidar_of_many_views_copies_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    views = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0))
    whole, copied, checked = lidar(views), [], spectrum._checked

    def counted(rows: Tensor) -> Tensor:
        copied.append(len(rows))
        return checked(rows)

    monkeypatch.setattr(spectrum, "_checked", counted)
    monkeypatch.setattr(spectrum, "_ROWS", 13)
    assert lidar(views) == pytest.approx(whole, rel=1e-9)
    assert copied == [12] * 10


def test_lidar_of_degenerate_features() -> None:
    assert lidar(torch.full((5, 3, 4), 0.3)) == 0
    two = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    assert lidar(two) == pytest.approx(1, rel=1e-9)
    assert lidar(two[:, :1].expand(2, 8, 5)) == pytest.approx(1, rel=1e-9)  # nothing within
    for wrong in (torch.zeros(1, 3, 4), torch.zeros(3, 1, 4), torch.zeros(3, 4)):
        with pytest.raises(ValueError, match="n, q >= 2"):
            lidar(wrong)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures without classes, and one that cannot be read."""
    place = tmp_path_factory.mktemp("images")
    for i in range(12):
        save_picture(place / f"{i:02d}.png", seed=i)
    (place / "07x.png").write_bytes(b"not a picture")
    return place


def test_the_first_views_are_the_global_crops_of_pre_training(images: Path) -> None:
    source, multi_crop = open_source(str(images)), MultiCrop(global_size=16, num_local=0)
    ids = np.arange(2, 6)
    (batch,) = augmented_views(source, multi_crop, ids, num_views=5, batch_size=8, num_workers=0)
    expected = multi_crop.arrays(count=4)
    for place, sample in enumerate(ids):
        picture = source.picture(int(sample))
        multi_crop(picture, expected, place, seed=SEED, epoch=0, sample=int(sample))
    views = batch.crops.unflatten(0, (4, 5))
    for view in range(2):
        np.testing.assert_array_equal(views[:, view], expected.global_crops[view])
    assert len(views.flatten(2).unique(dim=1)[0]) == 5  # all differ
    assert (batch.params.reshape(4, 5)["blur_radius"][:, ::2] > 0).all()  # crop 1 always blurs


def test_the_report_has_the_measures_of_the_features(
    weights: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    report = as_json(
        evaluate_rank(
            weights,
            str(images),
            samples=Samples(lidar_images=5, views=4),
            untrained=True,
            options=OPTIONS,
        )
    )
    extractor = load_extractor(weights, OPTIONS)
    features, numbers = extractor.unlabelled(open_source(str(images)))
    assert len(numbers) == 12
    assert report["score"]["rankme"] == rankme(features)
    assert 1 < report["score"]["lidar"] <= 4  # of five images, one less
    assert report["alpha_req"] is None
    assert report["measured"] == {"images": 12, "lidar_images": 5}
    assert report["untrained"].keys() == report["score"].keys()
    assert report["untrained"] != report["score"]
    assert "RankMe of 12 images is at most 12, though features have 64 dimensions" in caplog.text


def test_lidar_may_be_left_out_and_batches_do_not_matter(weights: Path, images: Path) -> None:
    few = evaluate_rank(weights, str(images), samples=Samples(5, views=0), options=OPTIONS)
    score = as_json(few)["score"]
    assert [*score] == ["rankme"]
    assert score["rankme"] <= 5
    samples = Samples(lidar_images=6, views=5)
    large, small = (
        as_json(
            evaluate_rank(
                weights, str(images), samples=samples, options=replace(OPTIONS, batch_size=size)
            )
        )["score"]
        for size in (64, 3)
    )
    assert small == pytest.approx(large, rel=1e-5)


def test_what_cannot_be_measured_is_a_sentence(weights: Path, tmp_path: Path) -> None:
    for wrong in ({"images": 0}, {"views": 1}, {"views": -2}, {"lidar_images": 1}):
        with pytest.raises(ConfigError, match="need"):
            Samples(**wrong)
    save_picture(tmp_path / "one" / "a.png", seed=0)
    with pytest.raises(DataError, match="1 of the 1 can be read; leave it out with --views 0"):
        evaluate_rank(weights, str(tmp_path / "one"), samples=Samples(), options=OPTIONS)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no")
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        evaluate_rank(weights, str(tmp_path / "bad"), samples=Samples(), options=OPTIONS)
