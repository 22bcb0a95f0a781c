"""The synthetic image set (`synthetic:shapes`) as shards with class numbers and masks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.build_shards import summary_of
from data_tools.journal import Json
from data_tools.numbering import class_lines
from data_tools.shard_writer import plan_shards, stored_bytes, write_set
from dinoscale.data.sources.synthetic import ShapesSource


def synthetic(
    out_dir: Path, *, images: int, size: int, seed: int, split: str, shard_bytes: int, workers: int
) -> Json:
    """Draw the set and write `KEY.png`, `KEY.cls` and `KEY.mask.png` (255 on an object).

    Args:
        out_dir: folder to write; keeps what an earlier run of the same work finished there.
        images: number of images.
        size: side of a picture in pixels.
        seed: seed of the drawing.
        split: train or test.
        shard_bytes: size of a shard if PNG did not compress.
        workers: number of processes.

    Returns:
        The summary, ready for JSON.

    Raises:
        DataError: a number is out of range, or `out_dir` is in use.
        RunFailedError: the disk is full, or a worker was killed.
    """
    source = ShapesSource(images=images, size=size, seed=seed, split=split)
    one = stored_bytes(np.array([3 * size**2, 1, size**2])).sum()  # picture, class, mask
    manifest = write_set(
        out_dir,
        _Drawn(source),
        plan_shards(np.full(images, one), np.arange(images), shard_bytes=shard_bytes, prefix=split),
        names=[source.path(i) for i in range(images)],
        classes=class_lines([(name,) for name in source.class_names]),
        settings={
            "tool": "synthetic",
            "images": images,
            "size": size,
            "seed": seed,
            "split": split,
            "shard_bytes": shard_bytes,
        },
        input={},
        module=__name__,
        workers=workers,
    )
    return summary_of(manifest, out_dir)


class _Drawn:
    def __init__(self, source: ShapesSource):
        self._source = source
        self._labels = source.labels

    def members(self, index: int) -> list[tuple[str, bytes]]:
        picture = Image.fromarray(self._source.picture(index).pixels())
        return [
            ("png", _png(picture)),
            ("cls", b"%d" % self._labels[index]),
            ("mask.png", _png(self._source.mask(index))),
        ]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
