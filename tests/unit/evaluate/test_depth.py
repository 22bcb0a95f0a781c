"""The distance of every pixel: errors and loss by hand, holes, one command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale import cli
from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.errors import ConfigError, DataError
from dinoscale.evaluate.dense_probes.probe import ProbeOptions
from dinoscale.evaluate.dense_probes.target_files import Part, TargetFiles
from dinoscale.evaluate.depth.bins import bins_loss, depth_of, sig_loss
from dinoscale.evaluate.depth.depth import evaluate_depth
from dinoscale.evaluate.depth.depth_errors import DepthErrors
from dinoscale.evaluate.depth.depth_files import DepthRange, DepthTargets, eigen_crop
from dinoscale.evaluate.depth.protocol import DepthProtocol
from dinoscale.models.zoo import build_backbone

SHAPE = BackboneShape(
    "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=4, num_heads=1
)
OPTIONS = ProbeOptions(num_workers=0, batch_size=4, progress=False)
RANGE = DepthRange()
SCALE = 1000.0


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    torch.manual_seed(1)
    card = BackboneCard(SHAPE, (0.5,) * 3, (0.25,) * 3, resize=16, crop=16, source="test")
    save_backbone(path, build_backbone(**vars(SHAPE)).state_dict(), card)
    return path


def _pair(seed: int, *, height: int = 26, width: int = 30) -> list[Image.Image]:
    """A picture that is the darker the farther, and its depth in millimetres with holes."""
    rng = np.random.default_rng(seed)
    near, far = rng.uniform(0.5, 2), rng.uniform(3, 9)
    depth = np.linspace(near, far, width)[None].repeat(height, axis=0)
    pixels = 250 - 24 * depth + rng.normal(0, 2, depth.shape)
    depth[:3] = 0
    gray = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
    return [gray, Image.fromarray((SCALE * depth).astype(np.uint16))]


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    """Five train images, and two test images named as NYUv2's."""
    for name, stems, first in (("train", "abcde", 0), ("test", "01", 9)):
        rename = ("rgb_{}", "sync_depth_{}") if name == "test" else ("{}", "{}")
        for folder in ("", "-depth"):
            (tmp_path / f"{name}{folder}").mkdir()
        for seed, stem in enumerate(stems, start=first):
            files = [f"{name}/{rename[0]}.png", f"{name}-depth/{rename[1]}.png"]
            for picture, file in zip(_pair(seed), files, strict=True):
                picture.save(tmp_path / file.format(stem))
    return [Part(str(tmp_path / n), str(tmp_path / f"{n}-depth")) for n in ("train", "test")]


def test_errors_by_hand() -> None:
    errors = DepthErrors()
    errors.add(np.float32([[1, 2, 7], [4, 5, 9]]), np.float32([[1, 3, 0], [5.2, 2, 0]]))
    errors.add(np.float32([[2]]), np.float32([[2]]))
    errors.add(np.float32([[2]]), np.float32([[0]]))  # a hole: no image
    # Ratios 1, 1.5, 1.3, 2.5: within 1.25 one of four, within 1.5625 three, within 1.953 three.
    assert errors.deltas() == pytest.approx({"delta1": 62.5, "delta2": 87.5, "delta3": 87.5})
    squares = (0 + 1 + 1.2**2 + 9) / 4
    logs = [0, math.log(1.5), math.log(1.3), math.log(2.5)]
    assert errors.errors() == pytest.approx(
        {
            "rmse": squares**0.5 / 2,
            "abs_rel": (1 / 3 + 1.2 / 5.2 + 3 / 2) / 4 / 2,
            "log10": sum(logs) / 4 / math.log(10) / 2,
            "rmse_log": (sum(x**2 for x in logs) / 4) ** 0.5 / 2,
        },
        rel=1e-6,
    )


def test_loss_by_hand() -> None:
    found, truth = torch.tensor([[1.0, 2, 4]]), torch.tensor([[2.0, 1, 0]])
    g = math.log(2)  # twice, of opposite sign: no common factor to forgive
    assert float(sig_loss(found, truth)) == pytest.approx(g, abs=1e-6)
    truth = torch.tensor([[2.0, 4, 0]])  # a common factor of 2
    expected = (g**2 - 0.85 * g**2) ** 0.5
    assert float(sig_loss(found, truth)) == pytest.approx(expected, abs=1e-6)
    holes = sig_loss(found.requires_grad_(), torch.zeros(1, 3))
    holes.backward()
    assert float(holes.detach()) == 0
    assert not found.grad.any()
    exact = sig_loss(found, found.detach())
    exact.backward()
    assert found.grad.isfinite().all()


def test_depth_is_the_mean_of_bins() -> None:
    outputs = torch.tensor([-3.0, 0.9, 2.9]).view(1, 3, 1, 1)
    found = depth_of(outputs, DepthRange(1, 5))
    assert float(found) == pytest.approx((0.1 * 1 + 1.0 * 3 + 3.0 * 5) / 4.1)
    loss = bins_loss(8, DepthRange(1, 5))(outputs, torch.full((1, 6, 7), float(found)))
    assert float(loss) == pytest.approx(0, abs=1e-3)


def test_depth_pictures() -> None:
    targets = DepthTargets(TargetFiles("depth.png"), SCALE, DepthRange(0.5, 10))
    picture = Image.fromarray(np.array([[0, 499, 500, 10000, 10001]], np.uint16))
    expected = np.array([[0, 0, 0.5, 10, 0]], np.float32)
    np.testing.assert_array_equal(targets.metres(picture, "a"), expected)
    metres = DepthTargets(TargetFiles("depth.png"), 1.0, DepthRange(0.5, 10))
    picture = Image.fromarray(np.array([[np.nan, 2.5, np.inf, -1]], np.float32))
    assert metres.metres(picture, "a").tolist() == [[0, 2.5, 0, 0]]
    with pytest.raises(DataError, match=r"a: its depth picture has the mode L, need .* 16 bits"):
        targets.metres(Image.new("L", (1, 1)), "a")


def test_eigen_crop_is_that_of_nyu() -> None:
    assert eigen_crop(480, 640) == (slice(45, 471), slice(41, 601))
    assert eigen_crop(240, 320) == (slice(22, 236), slice(20, 300))


def _small(*, iterations: int, **changes: object) -> DepthProtocol:
    recipe = DepthProtocol().recipe
    small = type(recipe)(iterations, 4, lr=0.01, weight_decay=0.0, warmup=0.1, clip=35.0)
    return DepthProtocol(scale=SCALE, crop=(24, 24), bins=16, recipe=small, **changes)


def test_dark_pixels_are_far(parts: list[Part], weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "head.safetensors"
    report = evaluate_depth(
        weights,
        *parts,
        protocol=_small(iterations=150),
        options=replace(OPTIONS, layers=4, pixels=True, out=out),
    )
    floor = report["baselines"]["mean_depth"]
    assert report["errors"]["rmse"] < 0.9 * floor["rmse"]
    assert report["score"]["delta1"] > floor["delta1"]
    assert report["baselines"]["colors"]["rmse"] < floor["rmse"]
    assert report["single"]["errors"]["rmse"] != report["errors"]["rmse"]
    assert report["blocks"] == [0, 1, 2, 3]
    assert out.exists()
    assert not [*tmp_path.glob("head.safetensors.*resume")]


def test_floor_is_the_mean_depth_of_train(parts: list[Part], weights: Path) -> None:
    report = evaluate_depth(
        weights, *parts, protocol=_small(iterations=1, eigen_crop=True), options=OPTIONS
    )
    train = [np.asarray(_pair(seed)[1]) / SCALE for seed in range(5)]
    mean = np.concatenate([x[x > 0] for x in train]).mean()
    rows, columns = eigen_crop(26, 30)
    test = [(np.asarray(_pair(seed)[1]) / SCALE)[rows, columns] for seed in (9, 10)]
    expected = np.mean([np.sqrt(np.square(x[x > 0] - mean).mean()) for x in test])
    assert report["baselines"]["mean_depth"]["rmse"] == pytest.approx(expected, rel=1e-5)


def test_all_holes_are_refused(parts: list[Part], weights: Path) -> None:
    protocol = DepthProtocol(scale=1.0)
    with pytest.raises(DataError, match=r"between 0.001 and 10.0 metres. .* \(1 numbers in a"):
        evaluate_depth(weights, *parts, protocol=protocol, options=OPTIONS)


def test_command(parts: list[Part], weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "depth", str(weights), "--train", parts[0].images, "--train-depths"]
    words += [str(parts[0].targets), "--test", parts[1].images, "--test-depths"]
    words += [str(parts[1].targets), "--crop", "16", "24", "--iterations", "3", "--bins", "8"]
    words += ["--num-workers", "0", "--untrained", "--layers", "1"]
    cli.run(words)
    report = json.loads(capsys.readouterr().out)
    assert list(report["score"]) == ["delta1", "delta2", "delta3"]
    assert report["untrained"].keys() == report["floors"].keys() == report["score"].keys()
    assert report["blocks"] == [3]
    with pytest.raises(ConfigError, match=r"need 0 < min_depth < max_depth, got 0.001 and 0.0"):
        cli.run([*words, "--max-depth", "0"])
