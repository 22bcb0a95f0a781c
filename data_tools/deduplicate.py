"""Find copies: files with the same bytes, and pictures that look alike or have similar features."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.files import Files, open_files, work_fingerprint
from data_tools.journal import Json, require_writable, write_whole
from data_tools.near_duplicates import (
    MAX_RADIUS,
    THUMBNAIL,
    Groups,
    close_pairs,
    look_alike,
    perceptual_hash,
    thumbnail,
)
from data_tools.numbering import numbering_of
from data_tools.survey import in_blocks, survey, unavailable_of
from dinoscale.data.decoding.decode import RGB, BadSampleError
from dinoscale.data.sources.folder import FolderSource
from dinoscale.errors import DataError

log = logging.getLogger(__name__)

_ROW = np.dtype(
    [
        ("sum", "<u8", 2),  # half of the sha256 of the file
        ("hash", "<u8"),
        ("hashed", "?"),  # it decodes and is not plain
        ("readable", "?"),
        ("unavailable", "?"),  # its file cannot be read now
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

    The pictures are taken from the largest to the smallest, then by file size, then by order. One
    that is like a kept picture is its copy; one that is only like a copy is kept.

    Args:
        spec: as for `open_files`.
        near: what counts as a copy besides the same bytes.
        out: groups, one JSON object per line; with it an interrupted run continues reading where it
            stopped (features are computed again).
        keep_list: list of the pictures to keep, which `build_shards` takes; without damaged ones,
            but with files that cannot be read, which may be intact.
        workers: number of processes.

    Returns:
        The summary, ready for JSON.

    Raises:
        CheckpointError: the weights cannot be used.
        DataError: there are no images, a setting is out of range, or a file cannot be written.
        RunFailedError: a worker was killed.
        UnavailableError: too many files cannot be read.
    """
    _check(near)
    for target in (out, keep_list):
        if target is not None:
            require_writable(target, spec)
    source = open_files(spec)
    rows = _rows(source, spec, decode=near is not None, out=out, workers=workers)
    found, first = _copies(source, rows, near, workers=workers)
    removed = {index for _, others in found for index in others}
    remain = np.flatnonzero(rows["readable"] | rows["unavailable"])
    kept = [i for i in remain.tolist() if i not in removed]
    classes = _class_names(source)
    if out is not None:
        lines = [json.dumps(_described(source, rows, classes, *copies)) for copies in found]
        write_whole(out, "".join(line + "\n" for line in lines).encode())
    if keep_list is not None:
        write_whole(keep_list, _listed(source, kept))
    exact = int((rows["readable"] & (first != np.arange(len(rows)))).sum())
    return {
        "spec": spec,
        "images": len(rows),
        "unreadable": int((~rows["readable"]).sum()),
        "unavailable": int(rows["unavailable"].sum()),
        "without_hash": int((rows["readable"] & ~rows["hashed"]).sum()) if near else None,
        "groups": len(found),
        "duplicates": len(removed),
        "of_the_same_bytes": exact,
        "of_another_class": _across_classes(source, classes, found),
        "kept": len(kept),
        "list": None if out is None else str(out),
        "keep_list": None if keep_list is None else str(keep_list),
    }


def _copies(
    source: Files, rows: NDArray[np.void], near: Near, *, workers: int
) -> tuple[list[tuple[int, list[int]]], NDArray[np.int64]]:
    """Kept pictures with their copies; for each image the first with the same bytes, (N,)."""
    groups = Groups(len(rows))
    first = _join_exact(rows, groups)
    pairs: set[tuple[int, int]] = set()  # from features, which are not stored
    for some in _near_pairs(source, rows, first, near, workers=workers):
        for one, other in some.tolist():
            groups.join(one, other)
            if isinstance(near, ByFeatures):
                pairs.add((one, other))
    is_copy = partial(_are_copies, rows, first, near, pairs)
    found = [copies for group in groups.of_several() for copies in _choose(rows, group, is_copy)]
    return found, first


def _check(near: Near) -> None:
    if isinstance(near, ByHash) and not 0 <= near.radius <= MAX_RADIUS:
        raise DataError(f"--radius {near.radius}: need 0 to {MAX_RADIUS} bits")
    if isinstance(near, ByFeatures) and not 0 < near.threshold <= 1:
        raise DataError(f"--threshold {near.threshold}: a cosine above 0, at most 1")


def _rows(
    source: Files, spec: str, *, decode: bool, out: Path | None, workers: int
) -> NDArray[np.void]:
    """What is compared for every image, (N,) of _ROW."""
    blocks = in_blocks(np.arange(len(source), dtype=np.int64))
    results = survey(
        _examine,
        (source, decode),
        blocks,
        sizes=[len(block) for block in blocks],
        out=out,
        work=work_fingerprint(source, spec, command={"decode": decode}, module=__name__),
        workers=workers,
    )
    parts = [np.frombuffer(base64.b64decode(result["rows"]), dtype=_ROW) for result in results]
    return np.concatenate(parts)


def _examine(shared: tuple[Files, bool], ids: NDArray[np.int64]) -> Json:
    source, decode = shared
    rows = np.zeros(len(ids), dtype=_ROW)
    unavailable: list[Json] = []
    for place, index in enumerate(ids.tolist()):
        try:
            _fill(rows[place], source, index, decode=decode)
        except BadSampleError as error:  # noqa: PERF203  # an image costs more than a try
            rows[place]["unavailable"] = error.unavailable
            unavailable += unavailable_of(error)
    return {"rows": base64.b64encode(rows.tobytes()).decode(), "unavailable": unavailable}


def _fill(row: np.void, source: Files, index: int, *, decode: bool) -> None:
    """Fill in one row; BadSampleError leaves it as it is."""
    data = source.data(index)
    pixels = RGB.open(data, source.path(index)).pixels() if decode else None
    row["readable"] = True
    row["sum"] = np.frombuffer(hashlib.sha256(data).digest()[:16], dtype="<u8")
    row["bytes"] = len(data)
    if pixels is not None:
        signature = perceptual_hash(pixels)
        row["hash"], row["hashed"] = signature or 0, signature is not None
        row["thumbnail"] = thumbnail(pixels)
        row["pixels"] = pixels.shape[0] * pixels.shape[1]


def _join_exact(rows: NDArray[np.void], groups: Groups) -> NDArray[np.int64]:
    """Join files with the same bytes; return for each image the first of them, (N,)."""
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
            yield ids[places]


def _are_copies(
    rows: NDArray[np.void],
    first: NDArray[np.int64],
    near: Near,
    pairs: set[tuple[int, int]],
    one: int,
    others: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Which of the other pictures count as copies of one, (P,)."""
    same: NDArray[np.bool_] = first[others] == first[one]
    if isinstance(near, ByHash):
        same |= look_alike(rows, one, others, radius=near.radius)
    if pairs:
        a = int(first[one])
        listed = [(min(a, b), max(a, b)) in pairs for b in first[others].tolist()]
        same |= np.array(listed, dtype=np.bool_)
    return same


def _choose(
    rows: NDArray[np.void],
    group: list[int],
    is_copy: Callable[[int, NDArray[np.int64]], NDArray[np.bool_]],
) -> Iterator[tuple[int, list[int]]]:
    """The kept pictures that have copies, with the copies, among pictures joined by similar pairs.

    A chain of pairs may join altogether different pictures, such as the frames of a video.
    """
    copies: dict[int, list[int]] = {}
    kept = np.zeros(0, dtype=np.int64)
    for one in sorted(group, key=lambda i: (-rows["pixels"][i], -rows["bytes"][i], i)):
        like = kept[is_copy(one, kept)]
        if len(like):
            copies.setdefault(int(like[0]), []).append(one)
        else:
            kept = np.append(kept, one)
    yield from ((keep, sorted(others)) for keep, others in copies.items())


def _class_names(source: Files) -> list[str | None]:
    """The class name of each image, None if it has none."""
    numbering = numbering_of(source)
    labels, names = numbering.labels, numbering.names
    if labels is None:
        return [None] * len(source)
    return [
        None if label < 0 else str(label) if names is None else names[label]
        for label in labels.tolist()
    ]


def _across_classes(
    source: Files, classes: list[str | None], found: list[tuple[int, list[int]]]
) -> int:
    """Count copies in another class than the kept picture, and warn of them."""
    pairs = [(keep, i) for keep, others in found for i in others if classes[keep] != classes[i]]
    if pairs:
        (keep, other), *_ = pairs
        log.warning(
            "%d copies are in another class than the picture that is kept, e.g. %s and %s; check"
            " which label is right",
            *(len(pairs), source.path(keep), source.path(other)),
        )
    return len(pairs)


def _described(
    source: Files,
    rows: NDArray[np.void],
    classes: list[str | None],
    keep: int,
    others: list[int],
) -> Json:
    return {
        "keep": source.path(keep),
        "class": classes[keep],
        "duplicates": [
            {
                "path": source.path(i),
                "class": classes[i],
                "same_bytes": bool((rows["sum"][i] == rows["sum"][keep]).all()),
            }
            for i in others
        ],
    }


def _paths(source: Files, ids: list[int]) -> list[str]:
    """Paths of images; `ROOT/./CLASS/...` if the folder of the set cannot be told from them."""
    paths = [source.path(i) for i in ids]
    if not isinstance(source, FolderSource) or source.labels is None or not paths:
        return paths
    if os.path.commonpath([os.path.dirname(path) for path in paths]) == source.root:
        return paths
    return [os.path.join(source.root, ".", os.path.relpath(path, source.root)) for path in paths]


def _listed(source: Files, ids: list[int]) -> bytes:
    paths = [os.fsencode(path) for path in _paths(source, ids)]
    for path in paths:
        if b"\n" in path or b"\r" in path:
            raise DataError(
                f"{path!r} has a line break in its name; no list can hold it. Rename it"
            )
    return b"".join(path + b"\n" for path in paths)
