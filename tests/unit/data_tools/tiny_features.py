"""Folders of features as `dinoscale embed` writes them, with rows of a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dinoscale.evaluate.embedding.array_file import ArrayFile
from dinoscale.evaluate.embedding.folder import FORMAT, FeatureFolder
from dinoscale.runtime.outputs import sha256


def write_features(
    out: Path,
    features: Mapping[str, NDArray[Any]],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    spec: str = "images",
    shard_size: int = 64,
) -> Path:
    """Write features by name, (N, D) or (N, P, D) each, in shards; names are 00000.jpg, ..."""
    number = len(next(iter(features.values())))
    names = names or [f"{i:05d}.jpg" for i in range(number)]
    folder = FeatureFolder(out, num_shards=-(-number // shard_size))
    settings = {"data": {"identity": f"of {spec}", "images": number}}
    folder.begin(settings)
    for shard in range(folder.num_shards):
        some = slice(shard * shard_size, min(number, (shard + 1) * shard_size))
        record: dict[str, Any] = {
            "first": some.start,
            "stop": some.stop,
            "images": [*names[some]],
            "sizes": [[40, 40]] * len(names[some]),
            **({} if labels is None else {"labels": [*labels[some]]}),
            "unreadable": [],
            "arrays": {},
        }
        for name, rows in features.items():
            path = folder.array(name, shard)
            with ArrayFile(path, dtype=rows.dtype, row_shape=rows.shape[1:]) as file:
                file.append(rows[some])
            record["arrays"][name] = {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
        folder.add(shard, record)
    folder.finish(
        {
            "format": FORMAT,
            "weights": {"path": "weights.safetensors"},
            "data": {"spec": spec, "left_out": {}},
            "images": number,
            "features": {
                name: {"dtype": rows.dtype.name, "shape": [*rows.shape]}
                for name, rows in features.items()
            },
            "classes": None if classes is None else [*classes],
            "unreadable": [],
            "settings": settings,
        }
    )
    folder.release()
    return out
