"""Step 0 against the source of the weights: equal within rounding, and what is not is refused."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.convert.initial_weights import read_gram_weights, read_initial_weights
from dinoscale.convert.run_checkpoint import card_of
from dinoscale.convert.step_zero import ROUNDING, compare_at_start, relative_difference
from dinoscale.convert.weights_file import save_backbone
from dinoscale.engine.build import StepZero, build_networks, shapes_only
from dinoscale.errors import ConfigError
from dinoscale.models.rope import Rope
from dinoscale.models.vit import VisionTransformer
from dinoscale.training.step_zero import compare_features
from tests.distributed.tiny_run import tiny_config

_PLAIN = tiny_config().model.model_dump(exclude_none=True)
LEARNED: dict[str, Any] = {**_PLAIN, "layer_scale": 0.1, "registers": 4}
ROTARY: dict[str, Any] = {
    **_PLAIN,
    **{"num_heads": 1, "rope": asdict(Rope()), "qkv_bias": True, "mask_key_bias": True},
}


def _network(seed: int = 3, **changes: dict[str, Any]) -> VisionTransformer:
    """A backbone whose weights are far from their initial values."""
    torch.manual_seed(seed)
    network, _ = build_networks(tiny_config(**changes))
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape), alpha=0.1)
    assert isinstance(network.backbone, VisionTransformer)
    return network.backbone.eval()


def _file(folder: Path, **changes: dict[str, Any]) -> Path:
    """Weights of a run with these changes, as `export` writes them."""
    card = card_of(tiny_config(**changes), source="a run")
    save_backbone(folder / "w.safetensors", _network(**changes).state_dict(), card)
    return folder / "w.safetensors"


def _compared(
    source: VisionTransformer, state: dict[str, Tensor], size: int = 16, **changes: dict[str, Any]
) -> StepZero:
    target = shapes_only(tiny_config(**changes)).backbone
    return compare_at_start(source, target, state, size=size)


def _permuted(state: dict[str, Tensor]) -> None:
    name = "blocks.1.attn.qkv.weight"
    state[name] = torch.cat(state[name].chunk(3)[::-1])


def _without_layer_scale(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if ".ls" in name]:
        state[name] = torch.ones_like(state[name])


def _moved(state: dict[str, Tensor]) -> None:
    state["pos_embed"] = state["pos_embed"].roll(1, dims=1)


def _one_bias(state: dict[str, Tensor]) -> None:
    state["patch_embed.proj.bias"] = torch.zeros_like(state["patch_embed.proj.bias"])


BREAKS = [_permuted, _without_layer_scale, _moved, _one_bias]


@pytest.mark.parametrize("break_", BREAKS)
def test_weights_that_fit_and_are_not_the_sources_are_seen(
    break_: Callable[[dict[str, Tensor]], None],
) -> None:
    source = _network(model=LEARNED)
    state = dict(source.state_dict())
    same = _compared(source, state, model=LEARNED)
    assert same.difference == 0
    assert same.bound >= 8 * ROUNDING
    break_(state)
    broken = _compared(source, state, model=LEARNED)
    assert broken.bound == same.bound
    assert broken.difference > 30 * broken.bound


def test_a_network_that_amplifies_rounding_is_not_allowed_any_features() -> None:
    source = _network(model=LEARNED)
    tokens = _compared(source, dict(source.state_dict()), model=LEARNED).class_tokens
    assert tokens is not None
    with torch.no_grad():
        source.norm.bias -= tokens[0]  # what is left of the class token is rounding
    state = dict(source.state_dict())
    same = _compared(source, state, model=LEARNED)
    assert (same.difference, same.bound) == (0, 2.0**-7)
    _moved(state)
    assert _compared(source, state, model=LEARNED).difference > same.bound


@pytest.mark.parametrize(
    ("precision", "share", "outcome"),
    [
        ("fp32", 1e-6, "within rounding"),
        ("fp32", 0.05, "warned"),
        ("bf16", 0.05, "within rounding"),
        ("bf16", 0.3, "warned"),
        ("fp32", 0.6, "refused"),
        ("bf16", 0.6, "refused"),
        ("bf16", float("nan"), "refused"),
    ],
)
def test_only_what_no_rounding_explains_of_the_sharded_teacher_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, precision: str, share: float, outcome: str
) -> None:
    tokens = torch.ones(1, 4)
    start = StepZero(torch.zeros(1, 3, 16, 16), tokens, difference=0.0, bound=1e-5)
    teacher: Any = SimpleNamespace(class_tokens=lambda _: tokens * (1 + share))
    engine = {"precision": precision, "zero_stage": 2}
    config = tiny_config(str(tmp_path), engine=engine, train={"init_from": "w.pth"})
    if outcome == "refused":
        way_on = {"bf16": r"engine\.precision=fp32", "fp32": r"another engine\.zero_stage"}
        with pytest.raises(ConfigError, match=f"does not compute .*set {way_on[precision]}"):
            compare_features(config, teacher, start)
    else:
        compare_features(config, teacher, start)
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event["outcome"] == outcome
    assert ("the run goes on" in caplog.text) == (outcome == "warned")


@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        (LEARNED, {**LEARNED, "norm_eps": 1e-4}, r"set model\.norm_eps=1e-06, as it has"),
        (ROTARY, {**ROTARY, "rope": {"base": 30.0}}, r"set model\.rope\.base=100\.0"),
        (
            ROTARY,
            {**ROTARY, "rope": {"coordinates": "max"}},
            r"set .*model\.rope\.coordinates=separate",
        ),
        (ROTARY, {**ROTARY, "mask_key_bias": False}, r"set model\.mask_key_bias=true"),
    ],
)
def test_a_setting_that_no_tensor_shows_is_refused_by_name(
    tmp_path: Path, there: dict[str, Any], here: dict[str, Any], says: str
) -> None:
    path = _file(tmp_path, model=there)
    assert read_initial_weights(_from(path, model=there)) is not None
    with pytest.raises(ConfigError, match=r"train\.init_from: .*differ by .*" + says):
        read_initial_weights(_from(path, model=here))
    gram = {"loss_weight": 1.0, "teacher": str(path)}
    with pytest.raises(ConfigError, match=r"gram\.teacher: .*differ by .*" + says):
        read_gram_weights(tiny_config(model=here, gram=gram))


def _from(path: Path, **changes: dict[str, Any]) -> RunConfig:
    return tiny_config(train={"init_from": str(path)}, **changes)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("side", [16, 40])
def test_channels_and_sizes_are_adapted_within_rounding(
    tmp_path: Path, rotary: bool, channels: int, side: int
) -> None:
    model = ROTARY if rotary else LEARNED
    numbers = [0.5] * channels
    data = {"num_workers": 0, "channels": channels, "mean": numbers, "std": numbers}
    config = _from(
        _file(tmp_path, model=model), model=model, data=data, crops={"global_size": side}
    )
    start = read_initial_weights(config)
    assert start is not None
    found = start.step_zero
    assert found is not None
    pixels = (24, 40) if rotary else (side, side)
    assert found.pictures.shape[1:] == (channels, *pixels)
    assert found.difference <= found.bound / 4
    assert found.class_tokens is not None
    assert found.bound < 1e-3


def test_a_difference_is_relative_to_the_length_of_a_token_and_keeps_a_nan() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
    found = torch.tensor([[3.0, 4.5], [0.0, 10.5]])
    assert relative_difference(found, expected) == pytest.approx(0.1)
    found[1, 0] = float("nan")
    assert relative_difference(found, expected) != relative_difference(found, expected)
