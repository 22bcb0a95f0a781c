"""Find copies: files of the same bytes, and pictures that look the same or mean the same."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.files import Files, open_files
from data_tools.journal import Json, check_place, write_whole
from data_tools.near_duplicates import (
    MAX_RADIUS,
    THUMBNAIL,
    Groups,
    close_pairs,
    perceptual_hash,
    thumbnail,
)
from data_tools.survey import identity, in_blocks, survey
from dinoscale.data.decode import RGB, BadSampleError
from dinoscale.errors import DataError

# Root mean square difference of two thumbnails, in levels of 255. Of 1000 photographs, copies at a
# quarter of the size or at JPEG quality 10 stay below 7.
_SAME_LOOK = 10.0

_ROW = np.dtype(
    [
        ("sum", "<u8", 2),  # half of the sha256 of the file
        ("hash", "<u8"),
        ("hashed", "?"),  # it decodes and is not plain
        ("readable", "?"),
        ("thumbnail", "u1", (THUMBNAIL, THUMBNAIL, 3)),
        ("pixels", "<i8"),  # width times height
        ("bytes", "<i8"),
    ]
)


@dataclass(frozen=True)
class ByHash:
    """Pictures whose perceptual hashes differ in at most `radius` of 64 bits."""

    radius: int


@dataclass(frozen=True)
class ByFeatures:
    """Pictures whose features have a cosine of at least `threshold`."""

    weights: str
    threshold: float
    num_heads: int | None


Near = ByHash | ByFeatures | None  # None: only the same bytes


def deduplicate(
    spec: str, near: Near, *, out: Path | None, keep_list: Path | None, workers: int
) -> Json:
    """Group copies, and say which picture of each group to keep.

    The largest picture is kept, of these the largest file, of these the first. Groups are chains:
    a picture belongs to a group if it is like one of its members.

    Args:
        spec: what `open_files` takes.
        near: what counts as a copy besides the same bytes.
        out: groups, one JSON object a line; with it an interrupted run goes on reading where it
            stopped (features are computed again).
        keep_list: list of the pictures that remain, which `build_shards` takes; files that cannot
            be read are not in it.
        workers: processes.

    Returns:
        The summary, ready for JSON.

    Raises:
        CheckpointError: the weights cannot be used.
        DataError: nothing is there, a setting is out of range, or a file cannot be written.
        RunFailedError: a worker was killed.
    """
    _check(near)
    for target in (out, keep_list):
        if target is not None:
            check_place(target, spec)
    source = open_files(spec)
    rows = _rows(source, decode=near is not None, out=out, workers=workers)
    groups = Groups(len(rows))
    first = _join_exact(rows, groups)
    for pairs in _near_pairs(source, rows, first, near, workers=workers):
        for one, other in pairs.tolist():
            groups.join(one, other)
    found = [_choose(rows, group) for group in groups.of_several()]
    removed = {index for _, others in found for index in others}
    kept = [i for i in np.flatnonzero(rows["readable"]).tolist() if i not in removed]
    if out is not None:
        lines = [json.dumps(_described(source, rows, keep, others)) for keep, others in found]
        write_whole(out, "".join(line + "\n" for line in lines).encode())
    if keep_list is not None:
        write_whole(keep_list, _listed(source, kept))
    exact = int((rows["readable"] & (first != np.arange(len(rows)))).sum())
    return {
        "spec": spec,
        "images": len(rows),
        "unreadable": int((~rows["readable"]).sum()),
        "without_hash": int((rows["readable"] & ~rows["hashed"]).sum()) if near else None,
        "groups": len(found),
        "duplicates": len(removed),
        "of_the_same_bytes": exact,
        "kept": len(kept),
        "list": None if out is None else str(out),
        "keep_list": None if keep_list is None else str(keep_list),
    }


def _check(near: Near) -> None:
    if isinstance(near, ByHash) and not 0 <= near.radius <= MAX_RADIUS:
        raise DataError(f"--radius {near.radius}: need 0 to {MAX_RADIUS} bits")
    if isinstance(near, ByFeatures) and not 0 < near.threshold <= 1:
        raise DataError(f"--threshold {near.threshold}: a cosine above 0, at most 1")


def _rows(source: Files, *, decode: bool, out: Path | None, workers: int) -> NDArray[np.void]:
    """What is compared of every image, (N,) of _ROW."""
    blocks = in_blocks(np.arange(len(source), dtype=np.int64))
    results = survey(
        _look,
        (source, decode),
        blocks,
        sizes=[len(block) for block in blocks],
        out=out,
        work=[*identity(source), decode],
        workers=workers,
    )
    parts = [np.frombuffer(base64.b64decode(result["rows"]), dtype=_ROW) for result in results]
    return np.concatenate(parts)


def _look(shared: tuple[Files, bool], ids: NDArray[np.int64]) -> Json:
    source, decode = shared
    rows = np.zeros(len(ids), dtype=_ROW)
    for place, index in enumerate(ids.tolist()):
        _fill(rows[place], source, index, decode=decode)
    return {"rows": base64.b64encode(rows.tobytes()).decode()}


def _fill(row: np.void, source: Files, index: int, *, decode: bool) -> None:
    """Fill in one row; one that cannot be read stays as it is."""
    try:
        data = source.data(index)
        pixels = RGB.open(data, source.path(index)).pixels() if decode else None
    except BadSampleError:
        return
    row["readable"] = True
    row["sum"] = np.frombuffer(hashlib.sha256(data).digest()[:16], dtype="<u8")
    row["bytes"] = len(data)
    if pixels is not None:
        signature = perceptual_hash(pixels)
        row["hash"], row["hashed"] = signature or 0, signature is not None
        row["thumbnail"] = thumbnail(pixels)
        row["pixels"] = pixels.shape[0] * pixels.shape[1]


def _join_exact(rows: NDArray[np.void], groups: Groups) -> NDArray[np.int64]:
    """Join files of the same bytes; return for each image the first with its bytes, (N,)."""
    order = np.lexsort((rows["sum"][:, 1], rows["sum"][:, 0]))  # stable: ascending where equal
    sums = rows["sum"][order]
    first = np.arange(len(rows), dtype=np.int64)
    for place in np.flatnonzero((sums[1:] == sums[:-1]).all(axis=1)).tolist():
        one, other = order[place], order[place + 1]
        if rows["readable"][one]:
            first[other] = first[one]
            groups.join(int(one), int(other))
    return first


def _near_pairs(
    source: Files, rows: NDArray[np.void], first: NDArray[np.int64], near: Near, *, workers: int
) -> Iterable[NDArray[np.int64]]:
    """Pairs of different files that count as copies, numbers of images (P, 2)."""
    different = first == np.arange(len(rows))
    if isinstance(near, ByFeatures):
        from data_tools.features import similar_pairs  # needs torch

        ids = np.flatnonzero(different & rows["readable"])
        yield from similar_pairs(
            source,
            ids,
            weights=near.weights,
            num_heads=near.num_heads,
            threshold=near.threshold,
            workers=workers,
        )
    if isinstance(near, ByHash):
        ids = np.flatnonzero(different & rows["hashed"])
        for places in close_pairs(rows["hash"][ids], radius=near.radius):
            pairs = ids[places]
            looks = rows["thumbnail"][pairs].astype(np.float32)  # (P, 2, 8, 8, 3)
            distance = np.sqrt(((looks[:, 0] - looks[:, 1]) ** 2).mean(axis=(1, 2, 3)))
            yield pairs[distance <= _SAME_LOOK]


def _choose(rows: NDArray[np.void], group: list[int]) -> tuple[int, list[int]]:
    """The picture to keep, and the others."""
    keep = max(group, key=lambda i: (rows["pixels"][i], rows["bytes"][i], -i))
    return keep, [index for index in group if index != keep]


def _described(source: Files, rows: NDArray[np.void], keep: int, others: list[int]) -> Json:
    return {
        "keep": source.path(keep),
        "duplicates": [
            {
                "path": source.path(i),
                "same_bytes": bool((rows["sum"][i] == rows["sum"][keep]).all()),
            }
            for i in others
        ],
    }


def _listed(source: Files, ids: list[int]) -> bytes:
    paths = [os.fsencode(source.path(i)) for i in ids]
    for path in paths:
        if b"\n" in path or b"\r" in path:
            raise DataError(
                f"{path!r} has a line break in its name; no list can hold it. Rename it"
            )
    return b"".join(path + b"\n" for path in paths)
