"""The feature cache: read if nothing changed, else not; its failures stop no measurement."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import dinoscale.runtime.fingerprint
from dinoscale.data.augmentation.labelled_crops import labelled_crops
from dinoscale.data.decoding.decode import Picture, UnavailableSampleError
from dinoscale.data.sources.folder import FolderSource
from dinoscale.errors import ConfigError, UnavailableError
from dinoscale.evaluate import features
from dinoscale.evaluate.features import extract_features, pixel_features


class Counted(nn.Module):
    """(N, C, H, W) -> (N, C); counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, crops: list[Tensor]) -> Tensor:
        self.calls += 1
        return torch.cat([x.mean((2, 3)) for x in crops]) * self.scale


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four grey images of two classes, and an empty cache."""
    monkeypatch.setenv("DINOSCALE_CACHE", str(tmp_path / "cache"))
    for i in range(4):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * i, 0, 9)).save(path)
    return tmp_path / "images"


def _extract(
    images: Path | FolderSource, backbone: Counted, **changed: object
) -> tuple[Tensor, Tensor]:
    settings: dict[str, object] = {
        "resize": 8,
        "crop": 8,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
        "batch_size": 4,
        "device": "cpu",
        "num_workers": 0,
        "output_key": "mean",
    }
    source = FolderSource(str(images)) if isinstance(images, Path) else images
    return extract_features(backbone, source, **(settings | changed))  # type: ignore[arg-type]  # settings of several types


def _kept(images: Path) -> list[Path]:
    return list((images.parent / "cache").glob("features-*"))


def test_a_second_run_reads_what_the_first_has_cached_and_logs_it(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features, labels = _extract(images, Counted())
    second = Counted()
    with caplog.at_level(logging.INFO):
        again, labels_again = _extract(images, second)
    assert second.calls == 0
    assert torch.equal(features, again)
    assert labels_again.tolist() == labels.tolist() == [0, 0, 1, 1]
    (kept,) = _kept(images)
    assert f"features read from cache: {kept}" in caplog.text


def test_a_folder_that_was_moved_is_read_from_the_cache(images: Path) -> None:
    _extract(images, Counted())
    moved = images.rename(images.with_name("elsewhere"))
    second = Counted()
    _extract(moved, second)
    assert second.calls == 0


def test_an_image_changed_in_place_is_noticed_even_with_its_old_size_and_time(images: Path) -> None:
    before, _ = _extract(images, Counted())
    path = images / "class1" / "3.bmp"
    old = path.stat()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert path.stat().st_size == old.st_size
    after, _ = _extract(images, Counted())
    assert torch.equal(after[:3], before[:3])
    assert not torch.equal(after[3], before[3])


@pytest.mark.parametrize(
    "changed",
    [
        {"crop": 6},
        {"resize": 9},
        {"mean": (0.0, 0.5, 0.5)},
        {"std": (1.0,) * 3},
        {"output_key": "x"},
    ],
)
def test_another_preparation_or_output_is_extracted_again(
    images: Path, changed: dict[str, object]
) -> None:
    _extract(images, Counted())
    second = Counted()
    _extract(images, second, **changed)
    assert second.calls == 1


def test_other_weights_and_another_set_are_extracted_again(images: Path) -> None:
    _extract(images, Counted())
    trained = Counted()
    with torch.no_grad():
        trained.scale += 1e-6
    _extract(images, trained)
    assert trained.calls == 1
    (images / "class0" / "2.bmp").unlink()
    fewer = Counted()
    assert len(_extract(images, fewer)[0]) == 3
    assert fewer.calls == 1


def test_without_an_output_key_nothing_is_cached(images: Path) -> None:
    _extract(images, Counted(), output_key=None)
    assert not _kept(images)


def test_the_least_recently_used_features_are_deleted(
    images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def calls(output_key: str) -> int:
        backbone = Counted()
        _extract(images, backbone, output_key=output_key)
        for number, path in enumerate(sorted(_kept(images), key=lambda p: p.stat().st_mtime_ns)):
            os.utime(path, ns=(0, number))  # as if all this was long ago, in the same order
        return backbone.calls

    size = 4 * 3 * 4 + 4 * 8  # of features and numbers; a file has a header of less than 4000
    monkeypatch.setenv("DINOSCALE_CACHE_GB", str((2 * size + 1.5 * 4000) / 1e9))
    assert [calls(output_key) for output_key in ("a", "b")] == [1, 1]
    (images.parent / "cache" / "features-x.safetensors.y.partial").write_bytes(b"killed")
    os.utime(images.parent / "cache" / "features-x.safetensors.y.partial", (0, 0))
    large = max(path.stat().st_size for path in _kept(images) if path.suffix == ".safetensors")
    monkeypatch.setenv("DINOSCALE_CACHE_GB", str((large + size) / 1e9))
    assert [calls(output_key) for output_key in ("a", "c", "a", "b")] == [0, 1, 0, 1]
    assert len(_kept(images)) == 2
    monkeypatch.setenv("DINOSCALE_CACHE_GB", "1e-9")
    assert calls("d") == 1
    assert not _kept(images)
    assert "are not cached" in caplog.text
    monkeypatch.setenv("DINOSCALE_CACHE_GB", "-1")
    with pytest.raises(ConfigError, match="DINOSCALE_CACHE_GB: need a number"):
        calls("d")


def test_code_of_images_and_networks_invalidates_features_and_no_comment_does(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(dinoscale.__file__).parent
    shutil.copytree(package, tmp_path / "dinoscale", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("dinoscale.runtime.fingerprint._ROOT", tmp_path)
    found = []
    for file, added in (
        ("data/decoding/decode.py", ""),
        ("data/decoding/decode.py", "# a comment\n"),
        ("data/decoding/decode.py", "WHITE = 255\n"),
        ("models/block.py", "EPS = 1e-5\n"),
    ):
        with (tmp_path / "dinoscale" / file).open("a") as code:
            code.write(added)
        dinoscale.runtime.fingerprint.code_fingerprint.cache_clear()
        backbone = Counted()
        _extract(images, backbone)
        found.append(backbone.calls)
    dinoscale.runtime.fingerprint.code_fingerprint.cache_clear()
    assert found == [1, 0, 1, 1]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_reported_and_replaced(
    images: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    features, _ = _extract(images, Counted())
    (kept,) = _kept(images)
    data = bytearray(kept.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    kept.write_bytes(data[: {"flipped": len(data), "cut": 100, "empty": 0}[damage]])
    second, third = Counted(), Counted()
    assert torch.equal(_extract(images, second)[0], features)
    assert second.calls == 1
    assert "extracting the features again" in caplog.text
    _extract(images, third)
    assert third.calls == 0


def test_images_left_out_are_left_out_of_the_cache_and_logged_again(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (images / "class0" / "2.bmp").write_bytes(b"BM no picture")
    features, labels = _extract(images, Counted())
    caplog.clear()
    again, labels_again = _extract(images, Counted())
    assert torch.equal(features, again)
    assert labels_again.tolist() == labels.tolist() == [0, 1, 1]
    assert "1 of 4 images were unreadable and left out" in caplog.text


def test_unavailable_images_end_the_measurement(images: Path) -> None:
    class Away(FolderSource):
        def picture(self, index: int) -> Picture:
            if index == 2:
                raise UnavailableSampleError(self.path(index), "stale file handle")
            return super().picture(index)

    away = Away(str(images))
    with pytest.raises(UnavailableError, match="stale file handle"):
        _extract(away, Counted())
    assert not _kept(images)
    with pytest.raises(UnavailableError, match="stale file handle"):
        pixel_features(away)
    crops = labelled_crops(
        away, size=8, interpolation="bicubic", batch_size=4, steps=1, seed=0, num_workers=0
    )
    with pytest.raises(UnavailableError, match="stale file handle"):
        next(crops)


def test_of_a_large_set_the_parts_that_are_done_are_kept(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(FolderSource):
        def picture(self, index: int) -> Picture:
            if index == 3:
                raise KeyboardInterrupt
            return super().picture(index)

    (images / "class0" / "0.bmp").write_bytes(b"BM no picture")
    whole, labels = _extract(images, Counted(), output_key=None)
    monkeypatch.setattr(features, "PART", 2)
    with pytest.raises(KeyboardInterrupt):
        _extract(Killed(str(images)), Counted(), batch_size=1)
    assert len(_kept(images)) == 1
    for calls in (2, 0):
        backbone = Counted()
        again, labels_again = _extract(images, backbone, batch_size=1)
        assert torch.equal(again, whole)
        # Room for all four rows: joining the parts would take twice their memory.
        assert again.untyped_storage().nbytes() == 4 * 3 * 4
        assert labels_again.tolist() == labels.tolist() == [0, 1, 1]
        assert backbone.calls == calls
    _extract(images, Counted(), batch_size=3)  # a part has a whole batch at least
    assert len(_kept(images)) == 4


@pytest.mark.parametrize("part", [2, 4])  # images
def test_features_too_large_for_the_cache_remove_no_others(
    part: int, images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wide(Counted):
        def forward(self, crops: list[Tensor]) -> Tensor:
            return super().forward(crops).repeat(1, 400)

    _extract(images, Counted(), output_key="a")
    kept = _kept(images)
    monkeypatch.setattr(features, "PART", part)
    monkeypatch.setenv("DINOSCALE_CACHE_GB", "15e-6")  # the four rows take 19 kB
    backbone = Wide()
    assert _extract(images, backbone, batch_size=1)[0].shape == (4, 1200)
    assert backbone.calls == 4
    assert _kept(images) == kept
    assert caplog.text.count("are not cached") == 1


def test_a_full_disk_stops_the_cache_but_not_the_measurement(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = FolderSource(str(images))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # bytes of a file
    try:
        features, _ = _extract(source, Counted())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(features) == 4
    assert "cannot cache the features" in caplog.text
    assert not _kept(images)


def test_a_cache_that_cannot_be_written_does_not_stop_the_measurement(
    images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (images.parent / "file").write_text("in the way")
    monkeypatch.setenv("DINOSCALE_CACHE", str(images.parent / "file"))
    assert len(_extract(images, Counted())[0]) == 4
    assert "cannot cache the features" in caplog.text
