"""A network initialized one tensor at a time has the values of a network built at once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinoscale.config import RunConfig
from dinoscale.engine.build import InitialWeights, build_networks, initial_values, shapes_only
from dinoscale.engine.initialization import build_on_meta
from dinoscale.errors import ConfigError
from dinoscale.planning.bench.tensor_memory import live_bytes, with_peak_bytes
from tests.distributed.tiny_run import tiny_config

SIZES = ("patch_size", "embed_dim", "depth", "num_heads")
CHANGES: list[dict[str, Any]] = [
    {},
    {"head": {"batch_norm": True, "norm_last_layer": False, "num_layers": 2}},
    {"model": {"backbone": "vit_small_patch14_reg4_dinov2", "depth": 2, "embed_dim": 24}},
    {"model": {"backbone": "resnet50", **dict.fromkeys(SIZES)}},
]


def _values(
    config: RunConfig, init_from: InitialWeights | None = None
) -> Iterator[tuple[str, Tensor]]:
    _, writes = build_on_meta(lambda: shapes_only(config))
    return initial_values(config, writes, init_from)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_values_are_those_of_a_network_on_the_cpu(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    expected = build_networks(config)[0].state_dict()
    found = dict(_values(config))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_initial_weights_change_no_other_value() -> None:
    config = tiny_config()
    backbone = {k: v + 1 for k, v in build_networks(config)[0].backbone.state_dict().items()}
    fresh, found = dict(_values(config)), dict(_values(config, InitialWeights(backbone)))
    for name, value in found.items():
        own = backbone.get(name.removeprefix("backbone."), fresh[name])
        assert torch.equal(value, own), name


def test_one_tensor_at_a_time_is_in_memory() -> None:
    config = tiny_config(model={"embed_dim": 96, "depth": 6})

    def draw_all() -> int:
        return max(value.nbytes for _, value in _values(config))

    before = live_bytes()
    largest, peak = with_peak_bytes(draw_all)
    assert peak - before < 1.1 * largest
    whole = sum(p.nbytes for p in build_networks(config)[0].parameters())
    assert whole > 5 * largest  # else the test would prove nothing


class _Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.1 * torch.ones(3))


class _InParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 3))
        nn.init.normal_(self.weight[:2])


@pytest.mark.parametrize("network", [_Computed, _InParts])
def test_tensor_that_is_neither_drawn_nor_filled_is_refused_by_name(
    network: type[nn.Module],
) -> None:
    name = next(name for name, _ in network().named_parameters())
    with pytest.raises(ConfigError, match=f"cannot train it: {name} is initialized by"):
        build_on_meta(network)
