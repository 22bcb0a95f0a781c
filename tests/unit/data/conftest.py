import builtins
import errno
import io
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.sources.source import Source

_REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def image_sets() -> Path:
    """The folder of labelled and odd image sets; tests that need real files skip without it."""
    for folder in (
        Path(os.environ.get("DINOSCALE_TEST_DATA", "")),
        _REPOSITORY / "shared" / "data",
        _REPOSITORY.parent / "shared" / "data",
    ):
        if (folder / "odd-images").is_dir():
            return folder
    pytest.skip("set DINOSCALE_TEST_DATA to the folder that holds odd-images/")


def picture(seed: int, *, width: int = 40, height: int = 30) -> Image.Image:
    """Smooth random colours: unlike noise they change when a crop is off by a pixel."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(seed: int, *, width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    picture(seed, width=width, height=height).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def decodes(source: Source, index: int) -> bool:
    try:
        source.picture(index).pixels()
    except BadSampleError:
        return False
    return True


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of `count` JPEGs, of which those numbered in `broken` do not decode."""

    def make(count: int, broken: tuple[int, ...] = ()) -> Path:
        folder = tmp_path / "images"
        folder.mkdir()
        for i in range(count):
            data = jpeg(i)
            (folder / f"{i:03}.jpg").write_bytes(data[:200] if i in broken else data)
        return folder

    return make


class Storage:
    """A file system that fails with what `fails` names, as often as it says; and its clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.fails: dict[str, float] = {}  # end of a path -> times
        self.ways = {"open", "stat", "scandir"}
        self.slept: list[float] = []
        monkeypatch.setattr("time.sleep", self.slept.append)
        for module, name in (
            (builtins, "open"), (io, "open"), (os, "open"), (os, "stat"), (os, "scandir"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, partial(self._tried, name, getattr(module, name)))

    def _tried(
        self, way: str, do: Callable[..., Any], path: Any = ".", *rest: Any, **named: Any
    ) -> Any:
        for end, times in self.fails.items():
            if str(path).endswith(end) and times > 0 and way in self.ways:
                self.fails[end] -= 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return do(path, *rest, **named)


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    return Storage(monkeypatch)
