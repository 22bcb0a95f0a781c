"""Pack a folder, a list of files or ImageNet's tars into tar shards for training."""

from __future__ import annotations

import io
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data_tools.files import Files, images_print, open_files
from data_tools.headers import read_header
from data_tools.journal import Json
from data_tools.numbering import numbering_of
from data_tools.shard_writer import plan_shards, stored_bytes, write_set
from dinoscale.data.decoding.decode import RGB
from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.mixture import left_out_of
from dinoscale.errors import DataError

log = logging.getLogger(__name__)

JPEG_QUALITY = 95  # of pictures made smaller; colour at half resolution, as usual
_STAT_THREADS = 16  # sizes wait for the file system, not for the processor

# By the content of a file, whatever its name. Anything else that Pillow reads becomes `.img`.
_EXTENSIONS = {
    "AVIF": "avif", "BMP": "bmp", "DIB": "dib", "GIF": "gif", "ICO": "ico", "JPEG": "jpg",
    "JPEG2000": "jp2", "MPO": "jpg", "NPY": "npy", "PNG": "png", "PPM": "ppm", "QOI": "qoi",
    "TGA": "tga", "TIFF": "tif", "WEBP": "webp",
}  # fmt: skip


def build_shards(
    spec: str,
    out_dir: Path,
    *,
    shard_bytes: int,
    max_side: int | None,
    seed: int | None,
    prefix: str,
    workers: int,
) -> Json:
    """Write shards of a source; the same bytes for any number of workers and interruptions.

    Args:
        spec: as for `open_files`.
        out_dir: folder to write; keeps what an earlier run of the same work finished there.
        shard_bytes: target size of a shard, reached from below.
        max_side: pixels; larger pictures are decoded, shrunk and encoded as JPEG. None copies all.
        seed: seed of the shuffle; None keeps the order of the source.
        prefix: prefix of the names of the shards.
        workers: number of processes.

    Returns:
        The summary, ready for JSON.

    Raises:
        DataError: the source cannot be read, a setting is out of range, or `out_dir` is in use.
        RunFailedError: the disk is full, or a worker was killed.
        UnavailableError: too many files cannot be read; the same command tries them again.
    """
    _check(max_side=max_side, seed=seed, prefix=prefix)
    source = open_files(spec)
    sizes = _sizes(source)
    numbering = numbering_of(source)
    labels = numbering.labels
    stored = stored_bytes(sizes)
    if labels is not None:
        stored += stored_bytes(np.ones_like(sizes))  # KEY.cls fits one block
    order = np.arange(len(source), dtype=np.int64)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    names = _names(source, spec)
    manifest = write_set(
        out_dir,
        _Copies(source, labels, max_side),
        plan_shards(stored, order, shard_bytes=shard_bytes, prefix=prefix),
        names=names,
        classes=numbering.listed,
        settings={
            "tool": "build-shards",
            "shard_bytes": shard_bytes,
            "max_side": max_side,
            "jpeg_quality": JPEG_QUALITY if max_side else None,
            "seed": seed,
            "prefix": prefix,
        },
        input={"images": images_print(source, spec)},
        module=__name__,
        workers=workers,
    )
    return {**summary_of(manifest, out_dir), "left_out_of_source": left_out_of(source).counts}


def summary_of(manifest: Json, out_dir: Path) -> Json:
    """The summary that a tool prints after writing shards."""
    left_out = manifest["left_out"]
    for entry in left_out:
        log.warning("left out %s: %s", entry["name"], entry["reason"])
    shards = manifest["shards"]
    return {
        "out": str(out_dir),
        "shards": len(shards),
        "shards_kept": manifest["shards_kept"],
        "samples": manifest["samples"],
        "bytes": manifest["bytes"],
        "left_out": len(left_out),
        "unavailable": sum("unavailable" in entry for entry in left_out),
        "left_out_files": left_out,
        "train": f"data.train={out_dir}",
    }


def _check(*, max_side: int | None, seed: int | None, prefix: str) -> None:
    if max_side is not None and max_side < 1:
        raise DataError(f"--max-side {max_side}: need at least one pixel")
    if seed is not None and seed < 0:
        raise DataError(f"--seed {seed}: need 0 or more")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", prefix):
        raise DataError(f"--prefix {prefix!r}: need letters, digits, - and _")


def _sizes(source: Files) -> NDArray[np.int64]:
    bar = tqdm(total=len(source), unit="file", desc="sizes", disable=None)
    if not isinstance(source, FolderSource):
        with bar:
            return np.array([source.size(i) for i in range(len(source))], dtype=np.int64)
    sizes = np.empty(len(source), dtype=np.int64)
    with bar, ThreadPoolExecutor(_STAT_THREADS) as pool:
        for index, size in enumerate(pool.map(source.size, range(len(source)))):
            sizes[index] = size
            bar.update()
    return sizes


def _names(source: Files, spec: str) -> list[str]:
    """Paths relative to the given folder, or to the folder of the given file."""
    path = os.path.abspath(os.path.expanduser(spec))
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    return [source.path(i).removeprefix(folder + "/") for i in range(len(source))]


class _Copies:
    """Files unchanged, except for pictures above the largest side; with their class numbers."""

    def __init__(self, source: Files, labels: NDArray[np.int64] | None, max_side: int | None):
        self._source = source
        self._labels = labels
        self._max_side = max_side

    def members(self, index: int) -> list[tuple[str, bytes]]:
        data, path = self._source.data(index), self._source.path(index)
        header = read_header(data, path)
        extension = _EXTENSIONS.get(header.format, "img")
        if self._max_side is not None:
            picture = RGB.open(data, path)
            side = max(picture.width, picture.height)
            shrink = max((s for s in (1, 2, 4, 8) if side >= 2 * s * self._max_side), default=1)
            pixels = picture.pixels(shrink=shrink)  # decoded even if it is copied, as a check
            if side > self._max_side:
                ratio = self._max_side / side
                size = (picture.width * ratio, picture.height * ratio)
                data, extension = _smaller(pixels, size), "jpg"
        members = [(extension, data)]
        if self._labels is not None and self._labels[index] >= 0:
            members.append(("cls", b"%d" % self._labels[index]))
        return members


def _smaller(pixels: NDArray[np.uint8], size: tuple[float, float]) -> bytes:
    """Shrink to a size in pixels (width, height) and encode."""
    width, height = (max(1, round(side)) for side in size)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
