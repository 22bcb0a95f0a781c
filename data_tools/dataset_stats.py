"""Mean and standard deviation of the pixels, for `data.mean` and `data.std`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.files import open_pictures, work_fingerprint
from data_tools.journal import Json, write_whole
from data_tools.survey import in_blocks, sample_ids, survey, unavailable_of
from dinoscale.data.decoding.decode import RGB, BadSampleError, Decoder
from dinoscale.data.sources.source import Source
from dinoscale.errors import DataError

_WHITE = 255  # of decoded pixels
_DIGITS = 4  # of the overrides


def dataset_stats(
    spec: str,
    decoder: Decoder = RGB,
    *,
    images: int | None,
    out: Path | None,
    workers: int,
) -> Json:
    """Measure all pixels of some images at full resolution, each pixel counting the same.

    Sums are whole numbers, so neither order nor processes change a digit.

    Args:
        spec: anything that a training or `open_files` reads.
        decoder: decodes the files.
        images: how many, drawn with a fixed seed; None takes all.
        out: file for the summary; with it an interrupted run continues.
        workers: number of processes.

    Returns:
        The summary, ready for JSON; `mean` and `std` by channel, in 0..1.

    Raises:
        DataError: there are no images, or none can be read.
        RunFailedError: a worker was killed.
        UnavailableError: too many files cannot be read.
    """
    source = open_pictures(spec, decoder)
    ids = sample_ids(len(source), wanted=images)
    blocks = in_blocks(ids)
    results = survey(
        _sums,
        source,
        blocks,
        sizes=[len(block) for block in blocks],
        out=out,
        work=work_fingerprint(
            source, spec, command={"images": len(ids), **asdict(decoder)}, module=__name__
        ),
        workers=workers,
    )
    pixels, bad = 0, 0
    total: list[int] = []  # by channel
    squares: list[int] = []
    for result in results:
        pixels += result["pixels"]
        bad += result["bad"]
        total = _plus(total, result["sum"])
        squares = _plus(squares, result["squares"])
    if not pixels:
        raise DataError(f"{spec}: none of the {len(ids)} images can be read")
    mean = [value / pixels / _WHITE for value in total]
    # In whole numbers up to the root: the difference of two large floats would lose digits.
    variance = [pixels * s - t * t for s, t in zip(squares, total, strict=True)]
    std = [math.sqrt(value) / pixels / _WHITE for value in variance]
    summary = {
        "spec": spec,
        "images": len(ids) - bad,
        "images_in_all": len(source),
        "unreadable": bad,
        "pixels": pixels,
        "mean": mean,
        "std": std,
        "overrides": [
            *([] if decoder.channels == 3 else [f"data.channels={decoder.channels}"]),
            *(
                []
                if decoder.max_pixel_value is None
                else [f"data.max_pixel_value={decoder.max_pixel_value:g}"]
            ),
            f"data.mean={_rounded(mean)}",
            f"data.std={_rounded(std)}",
        ],
    }
    if out is not None:
        write_whole(out, json.dumps(summary).encode() + b"\n")
    return summary


def _plus(one: list[int], other: list[int]) -> list[int]:
    """Add by channel; empty is nothing."""
    return [a + b for a, b in zip(one, other, strict=True)] if one and other else one or other


def _rounded(values: list[float]) -> str:
    return "[" + ",".join(f"{value:.{_DIGITS}f}" for value in values) + "]"


def _sums(source: Source, ids: NDArray[np.int64]) -> Json:
    pixels, bad = 0, 0
    unavailable: list[Json] = []
    total: list[int] = []
    squares: list[int] = []
    levels = np.arange(_WHITE + 1)
    for index in ids.tolist():
        try:
            image = source.picture(index).pixels()  # (H, W, C)
        except BadSampleError as error:
            bad += 1
            unavailable += unavailable_of(error)
            continue
        pixels += image.shape[0] * image.shape[1]
        counts = [
            np.bincount(image[..., channel].ravel(), minlength=_WHITE + 1)
            for channel in range(image.shape[2])
        ]
        total = _plus(total, [int(count @ levels) for count in counts])
        squares = _plus(squares, [int(count @ levels**2) for count in counts])
    return {
        "pixels": pixels,
        "sum": total,
        "squares": squares,
        "bad": bad,
        "unavailable": unavailable,
    }
