"""Decode every image and compare every shard with the checksums of its manifest."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.files import open_pictures, shards_of, work_fingerprint
from data_tools.journal import Json, write_whole
from data_tools.shard_writer import file_sha256, read_manifest
from data_tools.survey import in_blocks, survey
from dinoscale.data.decoding.decode import RGB, BadSampleError, Decoder
from dinoscale.data.sources.source import Source, open_source
from dinoscale.errors import DataError, UnavailableError
from dinoscale.runtime.fingerprint import (
    code_fingerprint,
    digest_of,
    files_fingerprint,
    fingerprint,
)

_SHOWN = 20  # bad samples in the summary; the list has all


@dataclass(frozen=True)
class _Shard:
    path: str
    record: Json | None  # of the manifest beside it


def verify_shards(spec: str, decoder: Decoder = RGB, *, out: Path | None, workers: int) -> Json:
    """Decode all images of a source; damaged shards are listed like damaged images.

    Args:
        spec: shards, or anything else that a training or `open_files` reads.
        decoder: decodes the files; a file with other channels is bad.
        out: list of what is bad, one JSON object per line: path, reason. With it an interrupted run
            continues after the last finished shard (of a folder: 256 images), and reads again what
            could not be read.
        workers: number of processes.

    Returns:
        The summary, ready for JSON; `bad` and `unavailable`, the number of files that cannot be
        read, are 0 if everything is intact.

    Raises:
        DataError: there are no images, or `out` cannot be written.
        RunFailedError: a worker was killed.
    """
    pieces, missing = _with_records(spec, shards_of(spec))
    found = (
        _shards(pieces, decoder, out, workers) if pieces else _images(spec, decoder, out, workers)
    )
    images, bad, unavailable = 0, missing, []
    for result in found:
        images += result["images"]
        bad += result["bad"]
        unavailable += result["unavailable"]
    if out is not None:
        lines = [*bad, *({**entry, "unavailable": True} for entry in unavailable)]
        write_whole(out, "".join(json.dumps(entry) + "\n" for entry in lines).encode())
    return {
        "spec": spec,
        "images": images,
        "shards": len(pieces),
        "shards_with_checksum": sum(piece.record is not None for piece in pieces),
        "bad": len(bad),
        "bad_samples": bad[:_SHOWN],
        "unavailable": len(unavailable),
        "unavailable_samples": unavailable[:_SHOWN],
        "list": None if out is None else str(out),
    }


def _shards(
    pieces: Sequence[_Shard], decoder: Decoder, out: Path | None, workers: int
) -> Iterator[Json]:
    sizes = [piece.record["samples"] if piece.record else 1 for piece in pieces]
    paths = [os.path.abspath(piece.path) for piece in pieces]
    images = files_fingerprint(os.path.dirname(paths[0]), paths)
    work = fingerprint(
        input={"images": images, "manifests": digest_of([piece.record for piece in pieces])},
        command=asdict(decoder),
        code=code_fingerprint(__name__),
    )
    return survey(
        _verify_shard, decoder, pieces,
        sizes=sizes, out=out, work=work, workers=workers, max_unavailable=math.inf,
    )  # fmt: skip


def _images(spec: str, decoder: Decoder, out: Path | None, workers: int) -> Iterator[Json]:
    source = open_pictures(spec, decoder)
    blocks = in_blocks(np.arange(len(source), dtype=np.int64))
    sizes = [len(block) for block in blocks]
    work = work_fingerprint(source, spec, command=asdict(decoder), module=__name__)
    return survey(
        _verify_block, source, blocks,
        sizes=sizes, out=out, work=work, workers=workers, max_unavailable=math.inf,
    )  # fmt: skip


def _with_records(spec: str, shards: list[str]) -> tuple[list[_Shard], list[Json]]:
    """Shards with their records in the manifest; for a whole folder, also the missing ones."""
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
    nothing: Json = {"images": 0, "bad": bad, "unavailable": []}
    try:
        if record is not None and file_sha256(Path(piece.path)) != record["sha256"]:
            bad.append({"path": piece.path, "reason": "its sha256 is not that of manifest.json"})
        source = open_source(piece.path, decoder)
    except UnavailableError as error:
        return {**nothing, "unavailable": [{"path": piece.path, "reason": str(error)}]}
    except DataError as error:
        if record is None or record["samples"]:  # all its files may have been left out
            bad.append({"path": piece.path, "reason": str(error)})
        return nothing
    if record is not None and len(source) != record["samples"]:
        reason = f"{len(source)} images, but manifest.json says {record['samples']}"
        bad.append({"path": piece.path, "reason": reason})
    found = _verify_block(source, np.arange(len(source), dtype=np.int64))
    return {**found, "bad": bad + found["bad"]}


def _verify_block(source: Source, ids: NDArray[np.int64]) -> Json:
    bad: list[Json] = []
    unavailable: list[Json] = []
    for index in ids.tolist():
        if error := _error_of(source, index):
            entry = {"path": source.path(index), "reason": error.reason}
            (unavailable if error.unavailable else bad).append(entry)
    return {"images": len(ids), "bad": bad, "unavailable": unavailable}


def _error_of(source: Source, index: int) -> BadSampleError | None:
    try:
        source.picture(index).pixels()
    except BadSampleError as error:
        return error
    return None
