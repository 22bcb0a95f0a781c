"""The points of a design: combinations of one value per axis."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from dinoscale.config.sections.backbones import VitSize
from dinoscale.config.sweep.axes import AxesConfig, LadderConfig
from dinoscale.config.sweep.file import SweepConfig
from dinoscale.scaling.design.model_sizes import sizes_of

Point = Mapping[str, object]  # axis -> value; a `VitSize` for the axis model

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
_MAX_LABEL = 100  # characters of a folder's name


def points(sweep: SweepConfig) -> Iterator[Point]:
    """Yield every combination of axis values, in the order of the file.

    Raises:
        ConfigError: an axis of models is invalid.
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
    """A short readable label that can name a folder, such as 192x12-img100000-s1."""
    parts = (
        f"{_SHORT.get(name, name.rpartition('.')[2])}{value_text(value)}"
        for name, value in point.items()
    )
    return "-".join(re.sub(r"[^A-Za-z0-9.-]+", "_", part) for part in parts)[:_MAX_LABEL]


def axes_of(point: Point) -> dict[str, object]:
    """The axis values of a point for tables, with a model as 192x12."""
    return {
        name: value_text(value) if isinstance(value, VitSize) else value
        for name, value in point.items()
    }


def value_text(value: object) -> str:
    """An axis value as short text."""
    if isinstance(value, VitSize):
        return f"{value.embed_dim}x{value.depth}"
    return f"{value:g}".replace("e+", "e") if isinstance(value, float) else str(value)
