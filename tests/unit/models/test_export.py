"""The backbone for export against the one that trains."""

from typing import Any

import pytest
import torch

from dinoscale.models.export import build_plain
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
REGISTERS = "vit_small_patch14_reg4_dinov2"


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"position_resize": "by_size"}),
        ("vit_tiny_patch16_224", {"layer_scale": 0.5, "ffn": "swiglu", "mask_token": True}),
        ("vit_tiny_patch16_224", {"registers": 2}),
        (REGISTERS, {}),
        (REGISTERS, {"position_resize": "by_factor"}),
        (REGISTERS, {"registers": 4, "ffn": "swiglu"}),
    ],
)
def test_tokens_are_those_of_the_trained_backbone_at_every_size(
    name: str, layers: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = build_backbone(name, **SIZES, **layers)
    assert isinstance(model, VisionTransformer)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    plain = build_plain(name, **SIZES, **layers)
    plain.load_state_dict(model.state_dict())
    model, plain = model.double(), plain.double()
    scripted = torch.jit.script(plain)
    for height, width in ((32, 32), (16, 24), (48, 32), (64, 16), (40, 72)):
        images = torch.randn(2, 3, height, width, dtype=torch.float64)
        tokens = model.features(images)
        for forward in (plain, scripted):
            cls, patches = forward(images)
            torch.testing.assert_close(cls, tokens[:, 0])
            torch.testing.assert_close(patches, tokens[:, -patches.shape[1] :])
