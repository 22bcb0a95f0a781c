"""A ladder of model sizes between two."""

from itertools import pairwise

import pytest

from dinoscale.config.sections.backbones import VIT_SIZES, VitSize
from dinoscale.config.sweep.axes import AxesConfig
from dinoscale.errors import ConfigError
from dinoscale.scaling.design.model_sizes import sizes_of


def _sizes(model: object) -> list[VitSize]:
    axis = AxesConfig.model_validate({"model": model}).model
    assert axis is not None
    return sizes_of(axis, where="axes.model")


def _ladder(first: object, last: object, steps: int, **more: int) -> list[VitSize]:
    return _sizes({"ladder": {"from": first, "to": last, "steps": steps, **more}})


def _of(embed_dim: int, depth: int, head_dim: int) -> dict[str, int]:
    return {"embed_dim": embed_dim, "depth": depth, "head_dim": head_dim}


def test_named_models_are_exact() -> None:
    assert _sizes(["tiny", "small", "base", "large"]) == [VitSize(*s) for s in VIT_SIZES.values()]


@pytest.mark.parametrize("ends", [("tiny", "large"), ("tiny", "small"), ("small", "base")])
def test_ends_of_a_ladder_are_exact(ends: tuple[str, str]) -> None:
    sizes = _ladder(*ends, 3)
    assert (sizes[0], sizes[-1]) == tuple(VitSize(*VIT_SIZES[name]) for name in ends)


@pytest.mark.parametrize(
    ("ends", "steps", "head_dim"),
    [
        (("tiny", "large"), 7, 64),
        (("tiny", "large"), 12, 32),
        (("small", "large"), 5, 64),
        ((_of(32, 2, 16), _of(128, 6, 16)), 5, 16),
    ],
)
def test_a_ladder_widens_and_deepens_in_equal_factors(
    ends: tuple[object, object], steps: int, head_dim: int
) -> None:
    sizes = _ladder(*ends, steps, head_dim=head_dim)
    assert len(sizes) == steps
    for size in sizes:
        assert (size.embed_dim % head_dim, size.num_heads) == (0, size.embed_dim // head_dim)
    scalars = [size.embed_dim**2 * size.depth for size in sizes]
    equal = (scalars[-1] / scalars[0]) ** (1 / (steps - 1))
    for (less, more), factor in zip(
        pairwise(sizes), [b / a for a, b in pairwise(scalars)], strict=True
    ):
        assert more.embed_dim >= less.embed_dim
        assert more.depth >= less.depth
        assert 0.7 * equal < factor < 1.4 * equal
    assert sizes[-1].embed_dim > sizes[0].embed_dim
    assert len({size.depth for size in sizes}) > 2


def test_models_of_one_depth_stay_at_it() -> None:
    assert {size.depth for size in _ladder("tiny", "base", 5)} == {12}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (["small", {"embed_dim": 384, "depth": 12}], "axes.model: 384x12 is listed twice"),
        (("base", "small", 3), "ladder: 768x12 to 384x12 does not grow"),
        (("small", "small", 2), "ladder: 384x12 to 384x12 does not grow"),
        ((_of(128, 4, 64), _of(192, 2, 64), 2), "neither width nor depth may shrink"),
        (("tiny", "small", 9), "fewer than 9 different sizes from 192x12 to 384x12"),
        (("tiny", _of(400, 12, 80), 3), "400x12 is not a whole number of heads of 64"),
    ],
)
def test_impossible_models_are_refused(model: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ladder(*model) if isinstance(model, tuple) else _sizes(model)
