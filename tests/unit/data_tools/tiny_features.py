"""Folders of features as `dinoscale embed` writes them, with rows of a test or a benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dinoscale.evaluate.embedding.array_file import ArrayFile
from dinoscale.evaluate.embedding.folder import FORMAT, FeatureFolder
from dinoscale.runtime.outputs import sha256


@dataclass(frozen=True)
class Block:
    """Some images: features by name, (n, D) or (n, P, D) each, names, labels, (height, width)s."""

    features: Mapping[str, NDArray[Any]]
    names: Sequence[str]
    labels: Sequence[int] | None = None
    sizes: Sequence[Sequence[int]] | None = None


def write_features(
    out: Path,
    features: Mapping[str, NDArray[Any]],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    sizes: Sequence[Sequence[int]] | None = None,
    classes: Sequence[str] | None = None,
    spec: str = "images",
    root: str | None = None,
    shard_size: int = 64,
) -> Path:
    """Write the features of a set in shards; names are 00000.jpg, ... unless given."""
    number = len(next(iter(features.values())))
    names = names or [f"{i:05d}.jpg" for i in range(number)]

    def blocks() -> Iterator[Block]:
        for start in range(0, number, shard_size):
            some = slice(start, start + shard_size)
            here = {name: rows[some] for name, rows in features.items()}
            yield Block(
                here,
                names[some],
                None if labels is None else labels[some],
                None if sizes is None else sizes[some],
            )

    return write_blocks(
        *(out, blocks()),
        num_blocks=-(-number // shard_size),
        spec=spec,
        root=root,
        classes=classes,
    )


def write_blocks(
    out: Path,
    blocks: Iterable[Block],
    *,
    num_blocks: int,
    spec: str = "images",
    root: str | None = None,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write a shard for each block, which are taken one by one."""
    folder = FeatureFolder(out, num_shards=num_blocks)
    settings = {"data": {"identity": f"of {spec}"}}
    folder.begin(settings)
    number, last = 0, None
    for shard, block in enumerate(blocks):
        record: dict[str, Any] = {
            "first": number,
            "stop": number + len(block.names),
            "images": [*block.names],
            "sizes": [*(block.sizes or [[40, 40]] * len(block.names))],
            **({} if block.labels is None else {"labels": [*block.labels]}),
            "unreadable": [],
            "arrays": {},
        }
        for name, rows in block.features.items():
            path = folder.array(name, shard)
            with ArrayFile(path, dtype=rows.dtype, row_shape=rows.shape[1:]) as file:
                file.append(rows)
            about = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
            record["arrays"][name] = about
        folder.add(shard, record)
        number, last = number + len(block.names), block
    assert last is not None
    folder.finish(
        {
            "format": FORMAT,
            "weights": {"path": "weights.safetensors"},
            "data": {"spec": spec, **({} if root is None else {"root": root}), "left_out": {}},
            "images": number,
            "features": {
                name: {"dtype": rows.dtype.name, "shape": [number, *rows.shape[1:]]}
                for name, rows in last.features.items()
            },
            "classes": None if classes is None else [*classes],
            "unreadable": [],
            "settings": settings,
        }
    )
    folder.release()
    return out
