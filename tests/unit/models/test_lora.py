"""Adapters: nothing at the start, their gradients, and the weights that they merge into."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinoscale.models.block import add_adapters
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.weight_names import merged
from dinoscale.models.zoo import build_backbone

RANK, ALPHA = 3, 6.0
VITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_scale": {"layer_scale": 0.3},
    "swiglu": {"ffn": "swiglu", "layer_scale": 0.3},
    "keyless_bias": {"mask_key_bias": True},
}


def _vit(name: str, dtype: torch.dtype = torch.float64) -> VisionTransformer:
    torch.manual_seed(0)
    backbone = build_backbone(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        **VITS[name],
    )
    assert isinstance(backbone, VisionTransformer)
    return backbone.to(dtype)


def _adapted(plain: VisionTransformer, *, moved: float) -> VisionTransformer:
    network = copy.deepcopy(plain)
    add_adapters(network.blocks, rank=RANK, alpha=ALPHA)
    network.to(next(plain.parameters()).dtype)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(".lora_b"):
                parameter += moved * torch.randn(parameter.shape, dtype=parameter.dtype)
    return network


def _merged(network: VisionTransformer, into: VisionTransformer) -> VisionTransformer:
    result = copy.deepcopy(into)
    result.load_state_dict(merged(network.state_dict(), scale=ALPHA / RANK))
    return result


def _images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=dtype)


@pytest.mark.parametrize("name", VITS)
def test_an_adapted_network_begins_as_it_was_to_the_bit(name: str) -> None:
    plain = _vit(name, torch.float32)
    images = _images(torch.float32)
    network = _adapted(plain, moved=0.0)
    assert torch.equal(network.features(images), plain.features(images))
    matrices = sum(p.ndim == 2 and n.endswith("weight") for n, p in plain.blocks.named_parameters())
    shapes = [p.shape for n, p in network.named_parameters() if "lora_" in n]
    assert len(shapes) == 2 * matrices
    assert all(RANK in shape for shape in shapes)
    assert plain.state_dict().keys() < network.state_dict().keys()


@pytest.mark.parametrize("name", VITS)
def test_merged_weights_compute_the_same(name: str) -> None:
    plain = _vit(name)
    network = _adapted(plain, moved=0.1)
    whole = _merged(network, plain)
    images = _images()
    found, expected = network.features(images), whole.features(images)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert (found - plain.features(images)).abs().max() > 1e-2
    # The queries' and keys' part is merged, too.
    pairs = zip(network.last_attention(images), whole.last_attention(images), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_float32_is_the_same_to_a_millionth() -> None:
    plain = _vit("layer_scale", torch.float32)
    network = _adapted(plain, moved=0.1)
    images = _images(torch.float32)
    found, expected = network.features(images), _merged(network, plain).features(images)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("recompute", [0, 1])
def test_adapters_have_the_gradient_of_the_weight_that_they_merge_into(
    name: str, recompute: int
) -> None:
    plain = _vit(name)
    network = _adapted(plain, moved=0.1)
    whole = _merged(network, plain)
    network.requires_grad_(False)
    for key, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in key)
    network.checkpoint_every = recompute
    crops = [_images(), torch.randn(3, 3, 16, 16, dtype=torch.float64)]
    for each in (network, whole):
        out = each(crops)
        assert isinstance(out, Tensor)
        out.square().sum().backward()
    layers = dict(network.named_modules())
    for key, parameter in whole.named_parameters():
        layer: Any = layers[key.rpartition(".")[0]]
        if not hasattr(layer, "lora_a") or not key.endswith("weight"):
            continue
        assert parameter.grad is not None
        scale = ALPHA / RANK
        of_a = scale * layer.lora_b.T @ parameter.grad
        of_b = scale * parameter.grad @ layer.lora_a.T
        torch.testing.assert_close(layer.lora_a.grad, of_a, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(layer.lora_b.grad, of_b, rtol=1e-8, atol=1e-10)
        assert layer.weight.grad is None


def test_only_the_layers_of_blocks_are_adapted() -> None:
    network = _adapted(_vit("plain"), moved=0.0)
    adapted = {n.rpartition(".")[0] for n, _ in network.named_parameters() if "lora_" in n}
    expected = {f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1")}
    assert adapted == expected | {f"blocks.{i}.mlp.fc2" for i in (0, 1)}
    assert not any(isinstance(m, nn.Conv2d) and hasattr(m, "lora_a") for m in network.modules())
