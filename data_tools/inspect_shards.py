"""What is in an image set: counts, sizes, formats, classes, and a contact sheet."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.contact_sheet import draw_sheet
from data_tools.files import Files, open_files, shards_of, work_fingerprint
from data_tools.headers import read_header
from data_tools.journal import Json, require_writable, write_whole
from data_tools.numbering import numbering_of
from data_tools.survey import in_blocks, sample_ids, survey, unavailable_of
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.sources.mixture import left_out_of
from dinoscale.errors import DataError

_SHOWN = 20  # classes in the summary, the largest and the smallest


def inspect_shards(
    spec: str,
    *,
    images: int | None,
    sheet: Path | None,
    sheet_images: int,
    out: Path | None,
    workers: int,
) -> Json:
    """Read headers, not pixels; only the pictures of the sheet are decoded.

    Args:
        spec: as for `open_files`: shards, a folder, a list, a tar of tars.
        images: how many to read, drawn with a fixed seed; None takes all.
        sheet: PNG to draw.
        sheet_images: pictures on it.
        out: file for the summary; with it an interrupted run continues.
        workers: number of processes.

    Returns:
        The summary, ready for JSON.

    Raises:
        DataError: there are no images, or a file cannot be written.
        RunFailedError: a worker was killed.
        UnavailableError: too many files cannot be read.
    """
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise DataError(f"--sheet {sheet}: the sheet is a PNG; end its name in .png")
    on_sheet = sheet_images if sheet is not None else 1
    if not 1 <= on_sheet <= 1024:
        raise DataError(f"--sheet-images {on_sheet}: need 1 to 1024")
    for target in (out, sheet):
        if target is not None:
            require_writable(target, spec)
    source = open_files(spec)
    ids = sample_ids(len(source), wanted=images)
    blocks = in_blocks(ids)
    found = survey(
        _examine,
        source,
        blocks,
        sizes=[len(block) for block in blocks],
        out=out,
        work=work_fingerprint(source, spec, command={"images": len(ids)}, module=__name__),
        workers=workers,
    )
    summary = {
        "spec": spec,
        "images": len(source),
        "left_out": left_out_of(source).counts,
        "looked_at": len(ids),
        "shards": len(shards_of(spec)),
        **_summed(list(found)),
        "classes": _classes(source),
        "sheet": None if sheet is None else str(sheet),
    }
    if sheet is not None:
        write_whole(sheet, draw_sheet(source, sample_ids(len(source), wanted=on_sheet)))
    if out is not None:
        write_whole(out, json.dumps(summary).encode() + b"\n")
    return summary


def _examine(source: Files, ids: NDArray[np.int64]) -> Json:
    """Sizes and kinds of a block; the size of a picture is that of its stored rows and columns."""
    unreadable, file_bytes = 0, []
    unavailable: list[Json] = []
    kinds: Counter[str] = Counter()
    sides: list[tuple[int, int]] = []
    for index in ids.tolist():
        try:
            data = source.data(index)
            header = read_header(data, source.path(index))
        except BadSampleError as error:
            unreadable += 1
            unavailable += unavailable_of(error)
            continue
        file_bytes.append(len(data))
        kinds[f"{header.format} {header.mode}"] += 1
        sides.append((header.width, header.height))
    return {
        "unreadable": unreadable,
        "unavailable": unavailable,
        "bytes": file_bytes,
        "kinds": kinds,
        "sides": sides,
    }


def _summed(results: list[Json]) -> Json:
    kinds: Counter[str] = Counter()
    for result in results:
        kinds.update(result["kinds"])
    sides = np.array([side for result in results for side in result["sides"]]).reshape(-1, 2)
    file_bytes = np.array([size for result in results for size in result["bytes"]])
    return {
        "unreadable_headers": sum(result["unreadable"] for result in results),
        "bytes": int(file_bytes.sum()),
        "bytes_of_an_image": _spread(file_bytes),
        "width": _spread(sides[:, 0]),
        "height": _spread(sides[:, 1]),
        "short_side_from": _histogram(sides.min(axis=1) if len(sides) else sides[:, 0]),
        "formats_and_modes": dict(kinds.most_common()),
    }


def _spread(values: NDArray[np.int64]) -> Json:
    if not len(values):
        return {}
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": round(float(values.mean()), 1),
        "max": int(values.max()),
    }


def _histogram(values: NDArray[np.int64]) -> dict[str, int]:
    """Number of images by the largest power of two, in pixels, that they reach."""
    powers = np.floor(np.log2(np.maximum(values, 1))).astype(np.int64)
    return {str(2**power): int((powers == power).sum()) for power in np.unique(powers).tolist()}


def _classes(source: Files) -> Json | None:
    numbering = numbering_of(source)
    labels, names = numbering.labels, numbering.names
    if labels is None:
        return None
    known, counts = np.unique(labels[labels >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    called = {
        str(number) if names is None else names[number]: int(count)
        for number, count in zip(known[order].tolist(), counts[order].tolist(), strict=True)
    }
    listed = list(called.items())
    if len(listed) > 2 * _SHOWN:
        listed = listed[:_SHOWN] + listed[-_SHOWN:]
    return {
        "number": len(known),
        "images_without": int((labels < 0).sum()),
        "smallest": int(counts.min()) if len(counts) else 0,
        "largest": int(counts.max()) if len(counts) else 0,
        "images_of": dict(listed),
    }
