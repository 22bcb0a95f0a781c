"""Write tar shards in the WebDataset layout with several processes, always with the same bytes.

The split is planned first, from the sizes of the files alone: which sample goes to which shard
under which key. A shard is then a function of its plan and its files, whichever process writes it
and however often the work was interrupted. Each is written beside its place, then renamed.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.journal import Journal, Json, fingerprint_of, read_if_there, write_whole
from data_tools.parallel import ordered_map
from data_tools.survey import require_few_unavailable
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.shards.manifest import FILE_NAME, FORMAT
from dinoscale.data.sources.classes import FILE_NAME as CLASSES
from dinoscale.errors import DataError, RunFailedError
from dinoscale.runtime.fingerprint import (
    Fingerprint,
    code_fingerprint,
    differences,
    digest_of,
    fingerprint,
)
from dinoscale.runtime.outputs import sha256
from dinoscale.runtime.retry import with_retries

log = logging.getLogger(__name__)

_NAMES = "names.jsonl"
_JOURNAL = ".progress.jsonl"

_BLOCK = 512  # bytes of a tar header; files are padded to a multiple of it
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20,
          "gib": 2**30}  # fmt: skip


class Samples(Protocol):
    """Numbered samples, picklable to worker processes."""

    def members(self, index: int) -> list[tuple[str, bytes]]:
        """Extensions and files of a sample, the picture first, or BadSampleError."""
        ...


@dataclass(frozen=True)
class ShardPlan:
    """The samples of one shard.

    Attributes:
        name: name of the file.
        first_key: key of the first sample; the others follow one by one.
        ids: numbers of the samples, (n,) int64.
    """

    name: str
    first_key: int
    ids: NDArray[np.int64]


def parse_bytes(text: str) -> int:
    """Read a size such as `256MiB`, `1GB` or `1000000`.

    Raises:
        DataError: it is not a size, or less than one byte.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]*)", text.strip())
    if not match or match[2].lower() not in _UNITS:
        raise DataError(f"{text!r} is not a size; write it as 256MiB, 1GB or 1000000")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise DataError(f"a size of {text!r}: need at least one byte")
    return size


def plan_shards(
    sizes: NDArray[np.int64], order: NDArray[np.int64], *, shard_bytes: int, prefix: str
) -> list[ShardPlan]:
    """Fill shards one after the other.

    Args:
        sizes: bytes of each sample with its headers, (N,).
        order: numbers of the samples in their order, (N,).
        shard_bytes: a shard ends before the sample that would make it larger.
        prefix: prefix of the names.
    """
    ends = np.cumsum(sizes[order])
    starts, first = [], 0
    while first < len(order):
        starts.append(first)
        before = int(ends[first - 1]) if first else 0
        first = max(first + 1, int(np.searchsorted(ends, before + shard_bytes, side="right")))
    return [
        ShardPlan(f"{prefix}-{number:06d}.tar", start, order[start:stop])
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(order)], strict=True))
    ]


def stored_bytes(size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes that files take in a tar, header included."""
    stored: NDArray[np.int64] = _BLOCK + -(-size // _BLOCK) * _BLOCK
    return stored


def write_set(
    out_dir: Path,
    samples: Samples,
    plans: Sequence[ShardPlan],
    *,
    names: Sequence[str],
    classes: bytes | None,
    settings: Json,
    input: Mapping[str, object],
    module: str,
    workers: int,
) -> Json:
    """Write all shards that are not there yet, `names.jsonl`, `classes.txt`, `manifest.json`.

    Args:
        out_dir: folder of the shards, made if needed.
        samples: the samples.
        plans: plans of the shards.
        names: original name of each sample, by its number.
        classes: content of `classes.txt`.
        settings: settings of the tool, for the manifest.
        input: what the set is made from, as for `fingerprint`.
        module: the module that makes the samples, e.g. `data_tools.synthetic`.
        workers: number of processes.

    Returns:
        The manifest, with `shards_kept`: how many existed before.

    Raises:
        DataError: `out_dir` holds something else, or no sample is an image.
        RunFailedError: the disk is full, or a worker was killed.
        UnavailableError: too many files cannot be read; shards without such files are kept.
    """
    command = {**settings, "classes": digest_of(os.fsdecode(classes or b""))}
    work = fingerprint(input=input, command=command, code=code_fingerprint(module))
    done = _claim(out_dir, plans, work)
    ordered = [names[i] for plan in plans for i in plan.ids.tolist()]
    with Journal(out_dir / _JOURNAL, work) as journal:
        for stale in out_dir.glob(".*.partial"):
            stale.unlink()
        done.update(journal.done)
        done = {number: record for number, record in done.items() if not _unavailable(record)}
        if done:
            log.info("continuing: %d of %d shards are done", len(done), len(plans))
        lines = "".join(json.dumps(name) + "\n" for name in ordered)
        _keep_or_write(out_dir / _NAMES, lines.encode())
        if classes is not None:
            _keep_or_write(out_dir / CLASSES, classes)
        pieces = [_Piece(plan, done.get(number)) for number, plan in enumerate(plans)]
        records = _written(out_dir, samples, pieces, journal, workers=workers)
        _require_few_unavailable(records, ordered)
        manifest = _manifest(records, ordered, settings, work)
        _keep_or_write(out_dir / FILE_NAME, json.dumps(manifest, indent=1).encode() + b"\n")
        journal.finish()
    if not manifest["samples"]:
        raise DataError(f"none of the {len(names)} files is an image; see {out_dir / FILE_NAME}")
    kept = sum(record == done.get(number) for number, record in enumerate(records))
    return {**manifest, "shards_kept": kept}


def _keep_or_write(path: Path, data: bytes) -> None:
    """Write a file of the set unless it is there; nothing marks those of a copied set as ours."""
    if read_if_there(path.read_bytes, path) != data:
        write_whole(path, data)


def _written(
    out_dir: Path, samples: Samples, pieces: Sequence[_Piece], journal: Journal, *, workers: int
) -> list[Json]:
    """The records of all shards; new ones also go to the journal."""
    records = []
    total = sum(len(piece.plan.ids) for piece in pieces)
    with tqdm(total=total, unit="img", desc="shards", disable=None) as bar:
        for number, record in enumerate(
            ordered_map(_write_shard, (out_dir, samples), pieces, workers=workers)
        ):
            if record != pieces[number].record:
                journal.add(number, record)
            records.append(record)
            bar.update(len(pieces[number].plan.ids))
    return records


def _require_few_unavailable(records: list[Json], names: list[str]) -> None:
    entries = [entry for record in records for entry in _unavailable(record)]
    require_few_unavailable(
        [{"path": names[int(entry["key"])], "reason": entry["reason"]} for entry in entries],
        of=len(names),
    )


def _claim(out_dir: Path, plans: Sequence[ShardPlan], work: Fingerprint) -> dict[int, Json]:
    """Finished shards of this very set; raises DataError if there is anything else."""
    manifest = read_manifest(out_dir)
    marks = [fingerprint_of(out_dir / _JOURNAL), manifest and manifest.get("fingerprint")]
    changes = [differences(mark, work) for mark in marks if mark is not None]
    ours = [] in changes
    tars = sorted(path.name for path in out_dir.glob("*.tar"))
    foreign = sorted(set(tars) - {plan.name for plan in plans}) if ours else tars
    if foreign or (not ours and (manifest is not None or changes)):
        named = f", e.g. {foreign[0]}" if foreign else ""
        changed = f" (not as it was: {', '.join(changes[0])})" if changes and not ours else ""
        raise DataError(
            f"{out_dir} holds shards of other images or settings, or of another version{changed}"
            f"{named}. Name an empty folder, or empty it."
        )
    if manifest is None or not ours:
        return {}
    return {number: record for number, record in enumerate(manifest["shards"])}


def _unavailable(record: Json) -> list[Json]:
    """Samples of a shard whose files could not be read when it was written."""
    return [entry for entry in record["left_out"] if entry.get("unavailable")]


def read_manifest(folder: Path) -> Json | None:
    """Read `manifest.json`, None if there is none.

    Raises:
        DataError: it is damaged, of a later version, or cannot be read.
    """
    path = folder / FILE_NAME
    text = read_if_there(path.read_bytes, path)
    if text is None:
        return None
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise DataError(f"{path} has format {manifest['format']}, not {FORMAT}")
        for record in manifest["shards"]:
            record["name"], record["bytes"], record["sha256"], record["samples"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}); remove it") from error
    return dict(manifest)


def _manifest(records: list[Json], names: list[str], settings: Json, work: Fingerprint) -> Json:
    left_out = [
        {"name": names[int(entry["key"])], **entry}
        for record in records
        for entry in record["left_out"]
    ]
    return {
        "format": FORMAT,
        "fingerprint": work,
        "settings": settings,
        "samples": sum(record["samples"] for record in records),
        "bytes": sum(record["bytes"] for record in records),
        "left_out": left_out,
        "shards": records,
    }


@dataclass(frozen=True)
class _Piece:
    plan: ShardPlan
    record: Json | None  # of the shard, if it was finished before


def _write_shard(shared: tuple[Path, Samples], piece: _Piece) -> Json:
    """Write one shard whole, or find it whole; return its record."""
    folder, samples = shared
    path = folder / piece.plan.name
    if piece.record and read_if_there(lambda: sha256(path), path) == piece.record["sha256"]:
        return piece.record
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as file:
            left_out = _fill(file, samples, piece.plan)
            file.flush()
            os.fsync(file.fileno())
        record = {
            "name": path.name,
            "bytes": beside.stat().st_size,
            "sha256": sha256(beside),
            "samples": len(piece.plan.ids) - len(left_out),
            "left_out": left_out,
        }
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunFailedError(
            f"cannot write {path}: {error.strerror}. Once that is fixed, the same command continues"
        ) from error
    return record


def _fill(file: BinaryIO, samples: Samples, plan: ShardPlan) -> list[Json]:
    """Write the members of a shard; return the samples that are left out."""
    left_out: list[Json] = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, index in enumerate(plan.ids.tolist(), start=plan.first_key):
            try:
                members = samples.members(index)
            except BadSampleError as error:
                flag = {"unavailable": True} if error.unavailable else {}
                left_out.append({"key": f"{key:09d}", "reason": error.reason, **flag})
                continue
            for extension, data in members:
                info = tarfile.TarInfo(f"{key:09d}.{extension}")  # owner 0, time 0
                info.size, info.mode = len(data), 0o444
                tar.addfile(info, io.BytesIO(data))
    return left_out


def file_sha256(path: Path) -> str:
    """The checksum of a file, 64 hexadecimal digits.

    Raises:
        DataError: it cannot be read, or not for about a minute.
    """
    return with_retries(lambda: sha256(path), str(path))
