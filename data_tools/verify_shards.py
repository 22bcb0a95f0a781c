"""Decode every image and compare every shard with the checksums of its manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.files import open_pictures, shards_of
from data_tools.journal import Json, write_whole
from data_tools.shard_writer import file_sha256, read_manifest
from data_tools.survey import identity, in_blocks, stamp, survey
from dinoscale.data.decode import RGB, BadSampleError, Decoder
from dinoscale.data.sources import Source, open_source
from dinoscale.errors import DataError

_SHOWN = 20  # bad samples in the summary; the list has all


@dataclass(frozen=True)
class _Shard:
    path: str
    record: Json | None  # of the manifest beside it


def verify_shards(spec: str, decoder: Decoder = RGB, *, out: Path | None, workers: int) -> Json:
    """Decode all images of a source; damaged shards are listed like damaged images.

    Args:
        spec: shards, or anything else that a training or `open_files` reads.
        decoder: what the pixels of a file become; other channels than it wants are bad.
        out: list of what is bad, one JSON object a line: path, reason. With it an interrupted run
            goes on from the last finished shard (of a folder: 256 images).
        workers: processes.

    Returns:
        The summary, ready for JSON; `bad` is 0 where everything is whole.

    Raises:
        DataError: nothing is there, or `out` cannot be written.
        RunFailedError: a worker was killed.
    """
    pieces, missing = _with_records(spec, shards_of(spec))
    found = (
        _shards(pieces, decoder, out, workers) if pieces else _images(spec, decoder, out, workers)
    )
    images, bad = 0, missing
    for result in found:
        images += result["images"]
        bad += result["bad"]
    if out is not None:
        write_whole(out, "".join(json.dumps(entry) + "\n" for entry in bad).encode())
    return {
        "spec": spec,
        "images": images,
        "shards": len(pieces),
        "shards_with_checksum": sum(piece.record is not None for piece in pieces),
        "bad": len(bad),
        "bad_samples": bad[:_SHOWN],
        "list": None if out is None else str(out),
    }


def _shards(
    pieces: Sequence[_Shard], decoder: Decoder, out: Path | None, workers: int
) -> Iterator[Json]:
    sizes = [piece.record["samples"] if piece.record else 1 for piece in pieces]
    work = [asdict(decoder), *([stamp(piece.path), piece.record] for piece in pieces)]
    return survey(_verify_shard, decoder, pieces, sizes=sizes, out=out, work=work, workers=workers)


def _images(spec: str, decoder: Decoder, out: Path | None, workers: int) -> Iterator[Json]:
    source = open_pictures(spec, decoder)
    blocks = in_blocks(np.arange(len(source), dtype=np.int64))
    sizes, work = [len(block) for block in blocks], [*identity(source), asdict(decoder)]
    return survey(_verify_block, source, blocks, sizes=sizes, out=out, work=work, workers=workers)


def _with_records(spec: str, shards: list[str]) -> tuple[list[_Shard], list[Json]]:
    """Shards with what their manifest says; of a whole folder, also those that are missing."""
    pieces = []
    records: dict[str, dict[str, Json]] = {}  # folder -> name -> record
    for path in shards:
        folder, name = os.path.split(os.path.abspath(path))
        if folder not in records:
            manifest = read_manifest(Path(folder)) or {"shards": []}
            records[folder] = {record["name"]: record for record in manifest["shards"]}
        pieces.append(_Shard(path, records[folder].get(name)))
    missing = []
    folder = os.path.abspath(os.path.expanduser(spec))
    if os.path.isdir(folder):
        absent = set(records.get(folder, ())) - {os.path.basename(path) for path in shards}
        missing = [
            {"path": os.path.join(folder, name), "reason": "missing, but named in manifest.json"}
            for name in sorted(absent)
        ]
    return pieces, missing


def _verify_shard(decoder: Decoder, piece: _Shard) -> Json:
    bad: list[Json] = []
    record = piece.record
    if record is not None and file_sha256(Path(piece.path)) != record["sha256"]:
        bad.append({"path": piece.path, "reason": "its sha256 is not that of manifest.json"})
    try:
        source = open_source(piece.path, decoder)
    except DataError as error:
        if record is None or record["samples"]:  # all its files may have been left out
            bad.append({"path": piece.path, "reason": str(error)})
        return {"images": 0, "bad": bad}
    if record is not None and len(source) != record["samples"]:
        reason = f"{len(source)} images, but manifest.json says {record['samples']}"
        bad.append({"path": piece.path, "reason": reason})
    found = _verify_block(source, np.arange(len(source), dtype=np.int64))
    return {"images": found["images"], "bad": bad + found["bad"]}


def _verify_block(source: Source, ids: NDArray[np.int64]) -> Json:
    bad = []
    for index in ids.tolist():
        reason = _fault(source, index)
        if reason:
            bad.append({"path": source.path(index), "reason": reason})
    return {"images": len(ids), "bad": bad}


def _fault(source: Source, index: int) -> str:
    try:
        source.picture(index).pixels()
    except BadSampleError as error:
        return error.reason
    return ""
