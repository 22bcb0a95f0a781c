"""A ladder of model sizes between two, in equal factors of parameters.

Each step takes the width and depth nearest to its place between the ends on logarithmic scales; a
width is a whole number of heads. Neither shrinks from step to step, so a ladder from ViT-Ti to
ViT-L widens and deepens as these two do (Dosovitskiy et al. 2021, arXiv:2010.11929, table 1).
"""

from __future__ import annotations

import math

from dinoscale.config.sections.backbones import VIT_SIZES, VitSize
from dinoscale.config.sweep.axes import LadderConfig, ModelSize
from dinoscale.errors import ConfigError


def sizes_of(axis: tuple[object, ...] | LadderConfig, *, where: str) -> list[VitSize]:
    """The models of an axis.

    Args:
        axis: the axis as written in the file.
        where: key of the axis in the file, for messages.

    Raises:
        ConfigError: a ladder has too many steps, or two entries are the same model.
    """
    if isinstance(axis, LadderConfig):
        return _ladder(axis, where=where)
    sizes = [size_of(entry) for entry in axis]
    for place, size in enumerate(sizes):
        if size in sizes[:place]:
            raise ConfigError(f"{where}: {size.embed_dim}x{size.depth} is listed twice")
    return sizes


def size_of(entry: object) -> VitSize:
    """A size by name, or one given by its numbers."""
    if isinstance(entry, ModelSize):
        return VitSize(entry.embed_dim, entry.depth, entry.embed_dim // entry.head_dim)
    return VitSize(*VIT_SIZES[str(entry)])


def _ladder(axis: LadderConfig, *, where: str) -> list[VitSize]:
    ladder = axis.ladder
    first, last = size_of(ladder.first), size_of(ladder.last)
    head_dim, names = ladder.head_dim, f"{_text(first)} to {_text(last)}"
    for end in (first, last):
        if end.embed_dim % head_dim:
            raise ConfigError(
                f"{where}.ladder: {_text(end)} is not a whole number of heads of {head_dim}"
                " (head_dim)"
            )
    if last.embed_dim < first.embed_dim or last.depth < first.depth or _text(first) == _text(last):
        raise ConfigError(
            f"{where}.ladder: {names} does not grow; neither width nor depth may shrink"
        )
    rungs = [(first.embed_dim, first.depth)]
    for step in range(1, ladder.steps - 1):
        rungs.append(
            _rung(first, last, share=step / (ladder.steps - 1), above=rungs[-1], axis=axis)
        )
    rungs.append((last.embed_dim, last.depth))
    if len(set(rungs)) < len(rungs):
        raise ConfigError(
            f"{where}.ladder: fewer than {ladder.steps} different sizes from {names} with heads of "
            f"{head_dim}; set fewer steps"
        )
    return [VitSize(width, depth, width // head_dim) for width, depth in rungs]


def _rung(
    first: VitSize, last: VitSize, *, share: float, above: tuple[int, int], axis: LadderConfig
) -> tuple[int, int]:
    """Width and depth nearest to a place between the ends, without shrinking."""
    width = _between(first.embed_dim, last.embed_dim, share)
    scalars = _between(_block_scalars(first), _block_scalars(last), share)

    def distance(size: tuple[int, int]) -> float:
        found = size[0] ** 2 * size[1]
        return abs(math.log(found / scalars)) + abs(math.log(size[0] / width))

    sizes = [
        (wide, min(max(round_(scalars / wide**2), above[1]), last.depth))
        for wide in range(above[0], last.embed_dim + 1, axis.ladder.head_dim)
        for round_ in (math.floor, math.ceil)
    ]
    return min(sizes, key=distance)


def _between(low: float, high: float, share: float) -> float:
    return math.exp(math.log(low) + share * math.log(high / low))


def _block_scalars(size: VitSize) -> int:
    """Parameters of all blocks, up to a factor and terms linear in the width."""
    return size.embed_dim**2 * size.depth


def _text(size: VitSize) -> str:
    return f"{size.embed_dim}x{size.depth}"
