"""The points of a design: one value of each axis."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from dinoscale.config.backbones import VitSize
from dinoscale.config.sweep.axes import AxesConfig, LadderConfig
from dinoscale.config.sweep.file import SweepConfig
from dinoscale.scaling.design.model_sizes import sizes_of

Point = Mapping[str, object]  # by name of the axis; of the axis model a `VitSize`

_SHORT = {
    "model": "",
    "flops": "c",
    "images": "img",
    "subset_size": "distinct",
    "batch_size": "bs",
    "lr": "lr",
    "lr_factor": "lrx",
    "seed": "s",
}
_MAX_LABEL = 100  # characters, of a folder's name


def points(sweep: SweepConfig) -> Iterator[Point]:
    """All combinations of values, in the order of the file.

    Raises:
        ConfigError: an axis of models is impossible.
    """
    for place, axes in sweep.all_axes:
        values = _values(axes, place=place)
        for combination in itertools.product(*values.values()):
            yield dict(zip(values, combination, strict=True))


def _values(axes: AxesConfig, *, place: str) -> dict[str, Sequence[object]]:
    found: dict[str, Sequence[object]] = {}
    for name, axis in axes.by_name().items():
        if name == "model":
            found[name] = sizes_of(axis, where=f"{place}.model")
        else:
            assert not isinstance(axis, LadderConfig)
            found[name] = axis
    return found


def label_of(point: Point) -> str:
    """Short and readable, such as 192x12-img100000-s1; fit to be the name of a folder."""
    parts = (
        f"{_SHORT.get(name, name.rpartition('.')[2])}{value_text(value)}"
        for name, value in point.items()
    )
    return "-".join(re.sub(r"[^A-Za-z0-9.-]+", "_", part) for part in parts)[:_MAX_LABEL]


def in_words(point: Point) -> dict[str, object]:
    """The point for tables: a model as 192x12."""
    return {
        name: value_text(value) if isinstance(value, VitSize) else value
        for name, value in point.items()
    }


def value_text(value: object) -> str:
    """A value of an axis as short text."""
    if isinstance(value, VitSize):
        return f"{value.embed_dim}x{value.depth}"
    return f"{value:g}".replace("e+", "e") if isinstance(value, float) else str(value)
