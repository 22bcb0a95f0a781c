from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.data.conftest import Storage, image_sets, jpeg

__all__ = ["Storage", "image_sets"]


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    """One of which all is known, but what is in the files."""
    made = Storage(monkeypatch)
    made.ways = {"open"}
    return made


@pytest.fixture
def class_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of `count` JPEGs in three class folders, wide ones if `width` says so."""

    def make(count: int = 24, *, width: int = 40) -> Path:
        folder = tmp_path / "images"
        for i in range(count):
            (folder / f"class {i % 3}").mkdir(parents=True, exist_ok=True)
            data = jpeg(i, width=width, height=width * 3 // 4)
            (folder / f"class {i % 3}" / f"{i:03}.v1.jpg").write_bytes(data)
        return folder

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
