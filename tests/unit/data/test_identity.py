"""The identity of a set: equal wherever it lies, another when images change, move or swap."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dinoscale.data.sources.mixture import open_sources
from dinoscale.errors import DataError

NAMES = ("a/0.png", "a/1.png", "b/0.png")


def _png(value: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (8 + value, 8), value).save(data, "png")
    return data.getvalue()


def _folder(root: Path) -> str:
    for number, name in enumerate(NAMES):
        path = root / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(number))
    return str(root / "set")


def _list(root: Path) -> str:
    folder = _folder(root)
    path = root / "list.txt"
    path.write_text("".join(f"{folder}/{name}\n" for name in NAMES))  # absolute
    return str(path)


def _tar(root: Path) -> str:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / "set.tar", "w") as tar:
        for number, name in enumerate(NAMES):
            member, data = tarfile.TarInfo(name), _png(number)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(root / "set.tar")


def _identity(*specs: str) -> str:
    return open_sources(specs).identity()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOSCALE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("make", [_folder, _list, _tar])
def test_a_copy_elsewhere_has_the_same_identity(
    tmp_path: Path, make: Callable[[Path], str]
) -> None:
    assert _identity(make(tmp_path / "here")) == _identity(make(tmp_path / "there"))


def test_renamed_and_replaced_images_give_another(tmp_path: Path) -> None:
    folder = Path(_folder(tmp_path))
    first = _identity(str(folder))
    shutil.copy(folder / "a/0.png", folder / "b/0.png")  # of another size
    replaced = _identity(str(folder))
    (folder / "a/0.png").rename(folder / "b/1.png")
    assert len({first, replaced, _identity(str(folder))}) == 3


def test_names_are_told_apart_where_they_end(tmp_path: Path) -> None:
    specs = []
    for number, names in enumerate((("a1.png", "b.png"), ("a.png", "1b.png"))):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w") as tar:
            for name in names:
                member, data = tarfile.TarInfo(name), _png(1)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        specs.append(str(path))
    assert _identity(specs[0]) != _identity(specs[1])
    assert _identity(*specs) != _identity(*specs[::-1])


def test_synthetic_images_are_told_by_what_draws_them() -> None:
    drawn = [
        f"synthetic:shapes?images=24&size={size}&seed={seed}" for size in (8, 16) for seed in (0, 1)
    ]
    assert len(set(map(_identity, drawn))) == 4
    assert open_sources(drawn[:1], subset_size=5).identity() != _identity(drawn[0])


def test_a_size_that_cannot_be_read_is_no_other_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_sources([_folder(tmp_path)])

    def stale(path: str) -> None:
        raise OSError(116, "Stale file handle", path)

    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(DataError, match=r"cannot read the size of .*0\.png: Stale file handle"):
        source.identity()


@pytest.mark.parametrize("make", [_folder, _list, _tar])
def test_computing_the_identity_calls_alive(tmp_path: Path, make: Callable[[Path], str]) -> None:
    signs: list[bool] = []
    source = open_sources([make(tmp_path)], subset_size=2)  # through those around it
    source.identity(lambda: signs.append(True))
    assert signs
