import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dinoscale.errors import ConfigError
from dinoscale.models.convnet import ConvNet
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import adopt, build_backbone, swiglu_width


def _build(name: str, **sizes: Any) -> VisionTransformer:
    model = build_backbone(name, **({"img_size": 224} | sizes))
    assert isinstance(model, VisionTransformer)
    return model


@pytest.mark.parametrize(
    ("name", "width", "depth", "patch_size", "params"),
    [
        ("vit_tiny_patch16_224", 192, 12, 16, 5524416),
        ("vit_small_patch16_224", 384, 12, 16, 21665664),
        ("vit_small_patch8_224", 384, 12, 8, 21670272),
        ("vit_base_patch16_224", 768, 12, 16, 85798656),
        ("vit_base_patch8_224", 768, 12, 8, 85807872),
        ("vit_large_patch16_224", 1024, 24, 16, 303301632),
        ("vit_tiny_patch8_224", 192, 12, 8, 5526720),  # the two timm does not have
        ("vit_large_patch8_224", 1024, 24, 8, 303313920),
    ],
)
def test_published_parameter_counts(
    name: str, width: int, depth: int, patch_size: int, params: int
) -> None:
    with torch.device("meta"):
        model = _build(name)
    assert sum(p.numel() for p in model.parameters()) == params
    assert (model.embed_dim, model.depth, model.patch_size) == (width, depth, patch_size)


def test_parameter_names_are_the_references() -> None:
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", *(f"blocks.{i}.{name}" for i in range(2) for name in block)]
    expected = [f"{layer}.{kind}" for layer in [*layers, "norm"] for kind in ("weight", "bias")]
    state = _build("vit_tiny_patch16_224", depth=2).state_dict()
    assert [*state] == ["cls_token", "pos_embed", *expected]
    assert state["pos_embed"].shape == (1, 197, 192)
    assert state["patch_embed.proj.weight"].shape == (192, 3, 16, 16)


def test_initial_weights_follow_the_reference() -> None:
    torch.manual_seed(0)
    model = _build("vit_small_patch16_224", depth=1)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.1)  # timm: 1e-6
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.eq(1 if name.endswith("weight") else 0).all()
        elif name.startswith("patch_embed"):
            assert parameter.abs().max().item() == pytest.approx((3 * 16**2) ** -0.5, rel=0.05)
        elif name.endswith("bias"):
            assert not parameter.any()
        elif name != "cls_token":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
            assert parameter.abs().max() > 0.06  # not cut at two standard deviations
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_sizes_can_be_changed() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
    model = _build("vit_small_patch16_224", **sizes)
    assert (model.embed_dim, model.depth, model.patch_size) == (64, 3, 8)
    assert model.pos_embed.shape == (1, 17, 64)
    assert model([torch.randn(2, 3, 32, 32)]).shape == (2, 64)


def test_sizes_of_a_name_timm_does_not_have_can_be_changed() -> None:
    model = _build("vit_tiny_patch8_224", img_size=32, depth=2)
    assert (model.depth, model.patch_size) == (2, 8)
    assert _build("vit_tiny_patch8_224", img_size=32, depth=1, patch_size=4).patch_size == 4


SMALL = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
        ("vit_tiny_patch16_224", {"scale_mlp_norm": True, "reg_tokens": 2}),
        ("vit_small_patch14_dinov2", {}),  # layer scale
        ("vit_small_patch14_reg4_dinov2", {}),  # registers, positions for patches only
        ("vit_giant_patch14_reg4_dinov2", {}),  # SwiGLU
        ("vit_base_patch32_clip_224", {}),  # norm before the blocks, no patch bias
        ("vit_base_patch16_clip_quickgelu_224", {}),
        ("deit3_small_patch16_224", {}),
        ("test_vit", {}),
    ],
)
def test_features_equal_those_of_timm(name: str, options: dict[str, Any]) -> None:
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=0, global_pool="token", **SMALL, **options)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs, images = theirs.double(), torch.randn(2, 3, 28, 28, dtype=torch.float64)
    expected, state = theirs.forward_features(images), theirs.state_dict()
    ours = adopt(theirs, name=name)
    assert ours.state_dict().keys() == state.keys()
    torch.testing.assert_close(ours.features(images), expected)
    torch.testing.assert_close(ours([images]), expected[:, 0])
    rows = ours.last_attention(images).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_layers_asked_for_have_timms_names() -> None:
    layers = {"layer_scale": 1e-3, "ffn": "swiglu", "registers": 2, "mask_token": True}
    model = _build("vit_tiny_patch16_224", **SMALL, **layers)
    plain = _build("vit_tiny_patch16_224", **SMALL).state_dict()
    state = model.state_dict()
    scales = {f"blocks.{i}.ls{branch}.gamma" for i in range(2) for branch in (1, 2)}
    assert state.keys() - plain.keys() == {"reg_token", "mask_token", *scales}
    assert plain.keys() <= state.keys()
    assert all(state[name].eq(1e-3).all() for name in scales)
    assert state["blocks.0.mlp.fc1.weight"].shape == (256, 48)
    assert state["blocks.0.mlp.fc2.weight"].shape == (48, 128)
    assert (state["reg_token"].shape, state["mask_token"].shape) == ((1, 2, 48), (1, 48))
    assert state["pos_embed"].shape == plain["pos_embed"].shape == (1, 5, 48)


def test_a_named_models_layers_can_be_changed() -> None:
    layers = {"layer_scale": 0.5, "ffn": "mlp", "registers": 0}
    model = _build("vit_giant_patch14_reg4_dinov2", **SMALL, **layers)
    state = model.state_dict()
    assert model.reg_token is None
    assert state["pos_embed"].shape == (1, 5, 48)
    assert state["blocks.0.ls1.gamma"].eq(0.5).all()
    assert state["blocks.0.mlp.fc1.weight"].shape == (192, 48)
    assert isinstance(model.blocks[0].get_submodule("mlp.act"), nn.GELU)


@pytest.mark.parametrize(
    ("embed_dim", "hidden"), [(64, 176), (384, 1024), (768, 2048), (1024, 2736), (1536, 4096)]
)
def test_swiglu_is_as_wide_as_the_references(embed_dim: int, hidden: int) -> None:
    assert swiglu_width(embed_dim) == hidden
    sizes = {**SMALL, "embed_dim": embed_dim, "depth": 1, "num_heads": 4}
    with torch.device("meta"):
        model = _build("vit_giant_patch14_dinov2", **sizes)
    assert model.blocks[0].get_submodule("mlp.fc2").in_features == hidden


def test_registers_of_timm_differ_by_the_position_in_the_class_token() -> None:
    import timm

    ours = _build("vit_small_patch14_dinov2", **SMALL, registers=4).double()
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs = timm.create_model(
        "vit_small_patch14_reg4_dinov2", num_classes=0, global_pool="token", **SMALL
    ).double()
    state = ours.state_dict()
    position, patches = state["pos_embed"].split([1, 4], dim=1)
    state |= {"cls_token": state["cls_token"] + position, "pos_embed": patches}
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(ours.features(images), theirs.forward_features(images))


@pytest.mark.parametrize(
    ("name", "special"),
    [
        ("vit_small_patch14_dinov2", 1),
        ("vit_base_patch14_reg4_dinov2", 5),
        ("vit_large_patch14_dinov2.lvd142m", 1),
        ("vit_giant_patch14_dinov2", 1),
    ],
)
def test_dinov2s_models_take_crops_of_224_and_98_pixels(name: str, special: int) -> None:
    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    model = _build(name, **sizes)
    crops = [torch.randn(2, 3, 224, 224), torch.randn(1, 3, 98, 98)]
    assert model([*crops]).shape == (3, 48)
    assert model.layout_of([(2, 224), (1, 98)]) == ((2, special + 256), (1, special + 49))


def test_a_model_with_layer_scale_starts_as_dinov2s() -> None:
    torch.manual_seed(0)
    model = _build("vit_small_patch16_224", depth=1, layer_scale=1e-5, registers=4, mask_token=True)
    assert model.cls_token.std().item() == pytest.approx(1e-6, rel=0.1)
    assert model.reg_token.std().item() == pytest.approx(1e-6, rel=0.1)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.mask_token is not None
    assert not model.mask_token.any()
    for name in ("attn.qkv", "mlp.fc1", "mlp.fc2"):
        layer = model.blocks[0].get_submodule(name)
        assert isinstance(layer, nn.Linear)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not layer.bias.any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_smal_patch16_224", "unknown model .*, did you mean 'vit_small_patch16_224'"),
        ("resnet51", "unknown model 'resnet51', did you mean 'resnet50'"),
        ("hf-hub:somebody/vit", "unknown model"),
        ("vit_huge_patch99_224", "unknown model"),
        ("eva02_tiny_patch14_224", "family 'eva', not a plain ViT"),
        ("resnet26", "family 'resnet', not a plain ViT"),
        ("vit_small_patch16_224.nope", r"Invalid pretrained tag \(nope\)"),
        ("vit_base_patch16_gap_224", "cannot build .* as a ViT with a class token"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
        ("vit_small_patch16_18x2_224", "blocks are ParallelThingsBlock"),
        ("vit_base_patch16_rpn_224", "as a ViT with a class token"),
        ("vit_base_patch16_xp_224", "blocks are ParallelScalingBlock"),
    ],
)
def test_models_we_cannot_reproduce_are_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught, torch.device("meta"):
        build_backbone(name, img_size=224)
    assert str(caught.value).startswith("model.backbone: ")
    assert re.search(re.escape(repr(name)), str(caught.value))


def _with(change: Callable[[Any], object]) -> Any:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL)
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "pos_embed", None), "no learned position embedding"),
        (lambda m: setattr(m, "norm", nn.Identity()), "no norm on its output tokens"),
        (lambda m: setattr(m, "fc_norm", nn.LayerNorm(48)), "normalises after pooling"),
        (lambda m: setattr(m, "patch_drop", nn.Dropout()), "drops patches"),
        (lambda m: setattr(m.patch_embed, "norm", nn.LayerNorm(48)), "normalises patch embed"),
        (lambda m: setattr(m.patch_embed, "proj", nn.Linear(3, 3)), "not a convolution"),
        (lambda m: setattr(m.blocks[1].mlp.drop1, "p", 0.1), "it has dropout"),
        (lambda m: setattr(m.blocks[1], "mlp", nn.Linear(48, 48)), "its MLP is a Linear"),
        (lambda m: setattr(m.blocks[1], "attn", nn.Linear(48, 48)), "attention is not plain"),
        (lambda m: setattr(m.blocks[1].attn, "gate", nn.Linear(48, 48)), "attention is not plain"),
        (lambda m: setattr(m.blocks[1], "drop_path1", nn.Dropout(0)), "stochastic depth"),
    ],
)
def test_parts_our_forward_would_skip_are_refused(
    change: Callable[[Any], object], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"cannot train 'changed': .*{message}"):
        adopt(_with(change), name="changed")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 7}, "dim should be divisible by num_heads"),
        ({"img_size": 30}, "crops.global_size: 30 is not a multiple of the patch size 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _build("vit_tiny_patch16_224", **({"img_size": 32} | sizes))


def test_resnet50_pools_each_resolution_by_itself() -> None:
    torch.manual_seed(0)
    model = build_backbone("resnet50", img_size=224)
    assert isinstance(model, ConvNet)
    assert model.embed_dim == 2048
    assert sum(p.numel() for p in model.parameters()) == 25557032 - 2049 * 1000
    assert "layer4.2.bn3.running_var" in model.state_dict()
    large, small = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 32, 32)
    first = model.state_dict()["bn1.running_mean"].clone()
    together = model([large[:1], large[1:], small])  # train mode: batch statistics
    assert together.shape == (5, 2048)
    assert model.state_dict()["bn1.num_batches_tracked"] == 2
    assert not torch.equal(model.state_dict()["bn1.running_mean"], first)
    torch.testing.assert_close(together, torch.cat((model([large]), model([small]))))


def test_resnet50_refuses_what_it_does_not_have() -> None:
    for key, value in {"depth": 3, "registers": 0, "mask_token": True}.items():
        options: dict[str, Any] = {key: value}
        with pytest.raises(ConfigError, match=rf"^model\.{key}: resnet50 has none"):
            build_backbone("resnet50", img_size=224, **options)
    with torch.device("meta"):
        model = build_backbone("resnet50", img_size=224)
    with pytest.raises(ValueError, match="keep must be None"):
        model([torch.zeros(1, 3, 32, 32)], torch.ones(1))
