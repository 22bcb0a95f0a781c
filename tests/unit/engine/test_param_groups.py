"""AdamW with several learning rates in one flat tensor, against torch's with a group for each."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinoscale.config import parse_config
from dinoscale.engine.build import shapes_only
from dinoscale.engine.param_groups import (
    LayerwiseAdamW,
    build_optimizer,
    rate_factors,
    trained_names,
)
from dinoscale.errors import ConfigError

PARTS = [(0.2, 0, 5), (0.5, 5, 12), (0.5, 17, 7), (1.0, 27, 3), (0.2, 30, 2)]  # 24-26 are padding
SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-8}


class _FusedCalls(TorchDispatchMode):
    """Counts calls of the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name == "aten::_fused_adamw_"
        return func(*args, **(kwargs or {}))


def _gradient(step: int) -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(step))


def test_every_part_moves_as_in_a_group_of_its_own() -> None:
    start = _gradient(99)
    flat = nn.Parameter(start.clone())
    ours = LayerwiseAdamW([{"params": [flat], "weight_decay": 0.3}], **SETTINGS)
    ours.set_factors(flat, PARTS)
    pieces = [nn.Parameter(start[first : first + numel].clone()) for _, first, numel in PARTS]
    groups = [
        {"params": [piece], "lr": 0.1 * factor, "weight_decay": 0.3}
        for piece, (factor, *_) in zip(pieces, PARTS, strict=True)
    ]
    plain = torch.optim.AdamW(groups, **SETTINGS, fused=True)
    for step, skipped in enumerate([0.0, 1.0, 0.0, 0.0]):
        flat.grad = _gradient(step)
        for piece, (_, first, numel) in zip(pieces, PARTS, strict=True):
            piece.grad = flat.grad[first : first + numel].clone()
        ours.found_inf = plain.found_inf = torch.tensor(skipped)  # type: ignore[attr-defined]
        with _FusedCalls() as calls:
            ours.step()
        assert calls.count == 3  # one for each rate
        plain.step()
    assert ours.state[flat]["step"] == 3
    for piece, (_, first, numel) in zip(pieces, PARTS, strict=True):
        part = slice(first, first + numel)
        torch.testing.assert_close(flat[part], piece, rtol=1e-6, atol=1e-7)
        for name in ("exp_avg", "exp_avg_sq"):
            expected = plain.state[piece][name]
            torch.testing.assert_close(ours.state[flat][name][part], expected, rtol=1e-6, atol=0)
    assert torch.equal(flat[24:27], start[24:27])
    theirs = plain.state_dict()["state"][0]
    assert ours.state_dict()["state"][0].keys() == theirs.keys()


def test_tensors_without_gradient_rest() -> None:
    network = nn.ModuleDict({"mlp": nn.Linear(3, 5), "last_layer": nn.Linear(5, 4)})
    optimizer = build_optimizer("adamw", network, layerwise=True)
    assert isinstance(optimizer, LayerwiseAdamW)
    for weight in network.parameters():
        optimizer.set_factors(weight, [(0.5, 0, weight.numel())])
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = [weight.detach().clone() for weight in network.parameters()]
    network["mlp"].weight.grad = torch.ones(5, 3)
    optimizer.step()
    moved = [
        not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True)
    ]
    assert moved == [True, False, False, False]
    assert [*optimizer.state] == [network["mlp"].weight]


def test_one_rate_is_torch_adamw_itself() -> None:
    network = nn.Linear(3, 5)
    assert type(build_optimizer("adamw", network)) is torch.optim.AdamW
    groups = build_optimizer("adamw", network, betas=(0.8, 0.95)).param_groups
    assert {group["betas"] for group in groups} == {(0.8, 0.95)}


def test_rates_fall_from_the_last_block_to_the_embeddings() -> None:
    blocks = [f"backbone.blocks.{i}.norm1.bias" for i in range(11)]
    tokens = [f"backbone.{kind}" for kind in ("cls_token", "pos_embed", "reg_token", "mask_token")]
    last = ["backbone.norm.weight", "head.mlp.0.weight", "patch_head.last_layer.weight_v"]
    patches = ["backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"]
    names = [*last, *blocks, *tokens, *patches]
    factors = rate_factors(names, layer_decay=0.5, patch_embed_lr=0.2)
    assert [factors[name] for name in last] == [1.0, 1.0, 1.0]
    assert [factors[name] for name in blocks] == [0.5 ** (11 - i) for i in range(11)]
    assert [factors[name] for name in tokens] == [0.5**12] * 4
    assert [factors[name] for name in patches] == [0.5**12 * 0.2] * 2
    assert {*rate_factors(names, layer_decay=1.0, patch_embed_lr=1.0).values()} == {1.0}
    resting = rate_factors(names, layer_decay=0.5, patch_embed_lr=0.2, backbone_lr=0.0)
    assert {name for name, factor in resting.items() if factor} == {*last[1:], *patches}
    assert all(resting[name] == factors[name] for name in (*last[1:], *patches))


def test_a_resting_backbone_keeps_its_weights_to_the_bit_and_moves_its_moments() -> None:
    network = nn.ModuleDict({"backbone": nn.Linear(3, 5), "head": nn.Linear(5, 4)})
    optimizer = build_optimizer("adamw", network, layerwise=True)
    assert isinstance(optimizer, LayerwiseAdamW)
    names = [name for name, _ in network.named_parameters()]
    factors = rate_factors(names, layer_decay=1.0, patch_embed_lr=1.0, backbone_lr=0.0)
    for name, weight in network.named_parameters():
        optimizer.set_factors(weight, [(factors[name], 0, weight.numel())])
        weight.grad = torch.ones_like(weight)
    for group in optimizer.param_groups:
        group.update(lr=0.1, weight_decay=0.4)
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    optimizer.step()
    moved = {n for n, weight in network.named_parameters() if not torch.equal(before[n], weight)}
    assert moved == {"head.weight", "head.bias"}
    assert all(optimizer.state[weight]["exp_avg"].all() for weight in network.parameters())


NAMES = (
    *("cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight", "norm.bias"),
    *("local_norm.weight", "blocks.0.norm1.weight", "blocks.0.ls1.gamma"),
    *("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.lora_a", "blocks.1.attn.q_norm.weight"),
    *("blocks.1.mlp.fc1.bias", "blocks.1.mlp.fc1.lora_b", "blocks.10.mlp.fc1.bias"),
)
ALWAYS = {"mask_token", "head.mlp.0.weight", "patch_head.last_layer.weight_v"}


def _trained(
    *,
    adapters: bool = False,
    norms: bool = False,
    patch_embed: bool = False,
    last: int | None = None,
) -> set[str]:
    """Those of `NAMES` and of heads that train, but for those that always do."""
    names = [f"backbone.{name}" for name in NAMES]
    names += [name for name in ALWAYS if "head" in name]
    found = trained_names(
        names, adapters=adapters, norms=norms, patch_embed=patch_embed, blocks=last
    )
    short = {name.removeprefix("backbone.") for name in found}
    assert short >= ALWAYS
    return short - ALWAYS


def test_more_blocks_than_there_are_cannot_train() -> None:
    config = parse_config({"optim": {"trained_blocks": 13}, "train": {"init_from": "w.pth"}})
    wanted = r"^optim.trained_blocks: vit_small_patch16_224 has 12 blocks, need at most as many"
    with pytest.raises(ConfigError, match=wanted):
        shapes_only(config)


def test_adapters_train_or_the_last_blocks_or_all() -> None:
    assert _trained() == {*NAMES} - ALWAYS
    adapters = {"blocks.0.attn.qkv.lora_a", "blocks.1.mlp.fc1.lora_b"}
    assert _trained(adapters=True) == adapters
    norms = {"norm.bias", "local_norm.weight", "blocks.0.norm1.weight"}
    norms |= {"blocks.1.attn.q_norm.weight"}
    assert _trained(adapters=True, norms=True) == adapters | norms
    projection = {"patch_embed.proj.weight"}
    assert _trained(adapters=True, patch_embed=True) == adapters | projection
    final = {"norm.bias", "local_norm.weight"}
    assert _trained(last=1) == final | {"blocks.10.mlp.fc1.bias"}
    of_last = {name for name in NAMES if name.startswith(("blocks.1.", "blocks.10."))}
    assert _trained(last=10) == final | of_last
