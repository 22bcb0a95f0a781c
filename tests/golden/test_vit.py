"""ViT against the reference with its own weights, at every recorded image size."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.vit import VisionTransformer, resize_pos_embed
from dinoscale.models.zoo import adopt

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)  # stored as float32

Recorded = tuple[VisionTransformer, dict[str, Tensor], list[str]]


@pytest.fixture(scope="module")
def recorded(
    golden_json: Callable[[str], dict[str, Any]], golden_tensors: Callable[[str], dict[str, Tensor]]
) -> Recorded:
    """The recorded model in float64, the tensors, and the recorded sizes as HxW."""
    ensure_torchvision()
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    geometry = golden_json("vit")
    norm_layer = partial(nn.LayerNorm, eps=geometry.pop("norm_eps"))
    source = TimmVisionTransformer(num_classes=0, norm_layer=norm_layer, **geometry)
    model = adopt(source, name="golden").double()
    tensors = {name: tensor.double() for name, tensor in golden_tensors("vit").items()}
    state = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
    model.load_state_dict(state)
    sizes = sorted(name.removesuffix(".input") for name in tensors if name.endswith(".input"))
    assert sizes
    return model, tensors, sizes


def test_class_token_matches_at_every_size(recorded: Recorded) -> None:
    model, tensors, sizes = recorded
    for size in sizes:
        assert_close(model([tensors[f"{size}.input"]]), tensors[f"{size}.cls"])


def test_class_tokens_match_with_all_sizes_in_one_forward(recorded: Recorded) -> None:
    model, tensors, sizes = recorded
    output = model([tensors[f"{size}.input"] for size in sizes])
    assert_close(output, torch.cat([tensors[f"{size}.cls"] for size in sizes]))


def test_last_attention_matches_at_every_size(recorded: Recorded) -> None:
    model, tensors, sizes = recorded
    for size in sizes:
        attention = model.last_attention(tensors[f"{size}.input"])
        assert_close(attention, tensors[f"{size}.last_attention"])


def test_intermediate_tokens_match_at_every_size(recorded: Recorded) -> None:
    model, tensors, sizes = recorded
    for size in sizes:
        count = sum(name.startswith(f"{size}.intermediate_") for name in tensors)
        outputs = model.intermediate(tensors[f"{size}.input"], count)
        for i, output in enumerate(outputs):
            assert_close(output, tensors[f"{size}.intermediate_{i}"])
        assert_close(outputs[-1], model.features(tensors[f"{size}.input"]))


def test_pos_embed_matches_at_every_size(recorded: Recorded) -> None:
    model, tensors, sizes = recorded
    for size in sizes:
        height, width = tensors[f"{size}.input"].shape[2:]
        resized = resize_pos_embed(
            model.pos_embed, image_size=(height, width), patch_size=model.patch_size
        )
        assert_close(resized, tensors[f"{size}.pos_embed"])
