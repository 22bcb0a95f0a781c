"""DINOv3 in timm and transformers: their own models are read, ours are written, or refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.convert.conversion import convert
from dinoscale.convert.formats.hf_dinov3 import from_hf_dinov3
from dinoscale.convert.formats.timm_dinov3 import (
    from_timm_dinov3,
    is_timm_dinov3,
    timm_dinov3_shape,
    timm_dinov3_tensors,
)
from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import load_backbone, save_backbone
from dinoscale.errors import CheckpointError, ConversionError
from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.rope import Rope
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone
from tests.unit.convert.scattered import scatter

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
PIXELS = ((32, 32), (56, 56), (24, 40))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _assert_same_tokens(path: Path, model: Any, **options: Any) -> None:
    """Compare in float64 with a model of either library."""
    backbone, _ = load_backbone(path, **options)
    assert isinstance(backbone, VisionTransformer)
    backbone, model = backbone.double(), model.double()
    for height, width in PIXELS:
        images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            if hasattr(model, "forward_features"):
                expected = model.forward_features(images.double())
            else:
                expected = model(images.double()).last_hidden_state
        # transformers keeps its table of frequencies in float32.
        torch.testing.assert_close(backbone.features(images.double()), expected, rtol=0, atol=1e-5)


NAMES = [
    *("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"),
    *("vit_small_plus_patch16_dinov3_qkvb", "vit_7b_patch16_dinov3"),
]


@pytest.mark.parametrize("name", NAMES)
def test_timms_own_folders_are_read(tmp_path: Path, name: str) -> None:
    ensure_torchvision()
    import timm
    from timm.models._hub import save_for_hf

    changed = {**SIZES, "rope_temperature": 50.0, "num_reg_tokens": 2, "num_classes": 5}
    model = timm.create_model(name, **changed).eval()
    scatter(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    weights = read_source(tmp_path)
    assert (weights.kind, sorted(weights.left_out)) == ("timm", ["head.bias", "head.weight"])
    assert weights.card.backbone.rope == Rope(50.0)
    _assert_same_tokens(tmp_path, model)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biases", ["", "q v", "q k v", "v"])
def test_transformers_own_folders_are_read(tmp_path: Path, gated: bool, biases: str) -> None:
    ensure_torchvision()
    import transformers

    has = {f"{role}_bias": role[0] in biases.split() for role in ("query", "key", "value")}
    config = transformers.DINOv3ViTConfig(
        **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8},
        **{"intermediate_size": 80, "use_gated_mlp": gated, "num_register_tokens": 3},
        **{"hidden_act": "silu" if gated else "gelu", "rope_theta": 50.0, "image_size": 32},
        **has,
    )
    model = transformers.DINOv3ViTModel(config).eval()
    scatter(model)
    model.save_pretrained(tmp_path)
    shape = read_source(tmp_path).card.backbone
    assert (shape.rope, shape.num_heads, shape.norm_eps) == (Rope(50.0), 2, 1e-5)
    assert (shape.qkv_bias, shape.mask_key_bias) == (bool(biases), biases in ("q v", "v"))
    _assert_same_tokens(tmp_path, model)
    settings = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("hidden_act", "relu"), ("rope_theta", -1.0), ("model_type", "vit")):
        (tmp_path / "config.json").write_text(json.dumps({**settings, key: value}))
        with pytest.raises(CheckpointError, match=key):
            read_source(tmp_path)


RELEASED = [
    *("small", "small_qkvb", "small_plus", "small_plus_qkvb", "base", "base_qkvb", "large"),
    *("large_qkvb", "huge_plus", "huge_plus_qkvb", "7b"),
]


@pytest.mark.parametrize("size", RELEASED)
def test_released_models_have_every_tensor_in_all_layouts(size: str) -> None:
    ensure_torchvision()
    import timm
    import transformers

    biased = size.endswith("_qkvb")
    name = f"vit_{size.removesuffix('_qkvb')}_patch16_dinov3{'_qkvb' if biased else ''}"
    with torch.device("meta"):
        in_timm = timm.create_model(name, num_classes=0, depth=3).state_dict()
        ours: Any = build_backbone(name, img_size=256, depth=3)
    assert is_timm_dinov3(in_timm, {})
    state, expected = from_timm_dinov3(in_timm), ours.state_dict()
    assert _shapes(state) == _shapes(expected)
    assert _shapes(timm_dinov3_tensors(expected)) == _shapes(in_timm)
    for settings in ({}, {"architecture": f"{name}.lvd1689m"}):
        shape = timm_dinov3_shape(state, settings, num_heads=None)
        assert shape.name == name.removesuffix("_qkvb")
        assert shape.num_heads == ours.blocks[0].attn.num_heads
        with torch.device("meta"):
            assert _shapes(build_backbone(**vars(shape)).state_dict()) == _shapes(expected)

    hidden = ours.blocks[0].mlp.fc2.in_features
    config = transformers.DINOv3ViTConfig(
        **{"hidden_size": ours.embed_dim, "num_hidden_layers": 3, "intermediate_size": hidden},
        **{"use_gated_mlp": hidden * 2 == ours.blocks[0].mlp.fc1.out_features},
        **{"num_register_tokens": 4, "num_attention_heads": shape.num_heads},
        **{"query_bias": biased, "value_bias": biased},
    )
    with torch.device("meta"):
        in_hf = transformers.DINOv3ViTModel(config).state_dict()
    found, left_out = from_hf_dinov3(in_hf)
    del found["mask_token"]
    assert (_shapes(found), left_out) == (_shapes(expected), ())


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


# Networks of our own

PLAIN = {"name": "vit_small_patch16_224", "ffn_ratio": 3.0, "norm_eps": 1e-5}
OWN: dict[str, dict[str, Any]] = {
    "as released": {"name": "vit_small_patch16_dinov3_qkvb", "mask_token": True},
    "for local crops": {"name": "vit_7b_patch16_dinov3", "local_norm": True, "registers": 0},
    "bare": {**PLAIN, "qkv_bias": False},
    "the keys' bias acts": {**PLAIN, "layer_scale": 0.1, "mask_key_bias": False},
    "by the longer side": {"name": NAMES[0], "rope": Rope(coordinates="max")},
    "periods of two ends": {"name": NAMES[0], "rope": Rope(None, 0.5, 20.0)},
}
REFUSED = {
    ("bare", "timm"): "have layer scale, and this has none",
    ("the keys' bias acts", "timm"): "have no bias of the keys",
    ("by the longer side", "timm"): "normalised by 'max'",
    ("by the longer side", "hf"): "normalised by 'max'",
    ("periods of two ends", "timm"): "periods run from 0.5 to 20",
    ("periods of two ends", "hf"): "periods run from 0.5 to 20",
}


@pytest.mark.parametrize("case", OWN)
def test_networks_of_ours_become_theirs_or_are_refused(tmp_path: Path, case: str) -> None:
    shape = BackboneShape(**{**SIZES, "rope": Rope(), **OWN[case]})
    backbone = build_backbone(**vars(shape)).eval()
    scatter(backbone)
    card = BackboneCard(shape, (0.5,) * 3, (0.25,) * 3, resize=40, crop=32, source="a test")
    source = tmp_path / "ours.safetensors"
    save_backbone(source, backbone.state_dict(), card)
    for to in ("timm", "hf", "torchscript"):
        message = REFUSED.get((case, to))
        if message is not None:
            with pytest.raises(ConversionError, match=message):
                convert(source, tmp_path / to, to=to)
            assert not (tmp_path / to).exists()
            continue
        proofs = convert(source, tmp_path / to, to=to)["parity"]["proofs"]
        assert [tuple(proof["size"]) for proof in proofs] == [(32, 32), (16, 16), (32, 16)]
        if to != "torchscript":
            again, found = load_backbone(tmp_path / to)
            assert found.preprocessing == card.preprocessing
            images = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
            expected = backbone.intermediate(images, 1)[0]  # type: ignore[union-attr]  # a ViT
            tokens = again.intermediate(images, 1)[0]  # type: ignore[union-attr]  # likewise
            torch.testing.assert_close(tokens, expected, rtol=0, atol=2e-5)
    if (case, "timm") not in REFUSED:
        stored = load_file(tmp_path / "timm" / "model.safetensors")
        assert not any("mask_token" in name or "local" in name for name in stored)


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_a_bare_file_says_what_is_guessed_and_needs_the_heads_of_other_widths(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, to: str
) -> None:
    def write_bare(embed_dim: int) -> Path:
        sizes = {**SIZES, "embed_dim": embed_dim, "depth": 1, "num_heads": 2}
        shape = BackboneShape("vit_small_patch16_dinov3_qkvb", **sizes)
        card = BackboneCard(shape, (0.5,) * 3, (0.25,) * 3, resize=40, crop=32, source="a test")
        source = tmp_path / f"{embed_dim}.safetensors"
        save_backbone(source, build_backbone(**vars(shape)).state_dict(), card)
        convert(source, tmp_path / str(embed_dim), to=to)
        tensors = load_file(tmp_path / str(embed_dim) / "model.safetensors")
        save_file(tensors, tmp_path / f"bare_{embed_dim}.safetensors")
        caplog.clear()
        return tmp_path / f"bare_{embed_dim}.safetensors"

    bare = write_bare(64)
    assert read_source(bare, num_heads=2).card.backbone.num_heads == 2
    (said,) = caplog.messages
    assert "no config.json" in said
    base = "rope_temperature 100" if to == "timm" else "rope_theta 100"
    assert "1e-05" in said
    assert base in said
    assert read_source(bare).card.backbone.num_heads == 1
    assert "assuming num_heads=1" in caplog.messages[-1]
    bare = write_bare(48)
    with pytest.raises(CheckpointError, match=r"embed_dim 48, from which .* give num_heads"):
        read_source(bare)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "vit_small_patch16_224"])
def test_a_number_of_heads_that_contradicts_the_architecture_is_refused(
    tmp_path: Path, name: str
) -> None:
    ensure_torchvision()
    import timm

    model = timm.create_model(name, num_classes=0, depth=1, img_size=32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    assert read_source(tmp_path, num_heads=6).card.backbone.num_heads == 6
    with pytest.raises(CheckpointError, match="has num_heads=6, not 4; omit num_heads"):
        read_source(tmp_path, num_heads=4)


def _settings_of_hf(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Path and content of the config.json of a small DINOv3ViTModel."""
    model = build_backbone(NAMES[0], img_size=32, depth=1, mask_token=True)
    shape = BackboneShape(NAMES[0], img_size=32, depth=1, mask_token=True)
    card = BackboneCard(shape, (0.5,) * 3, (0.25,) * 3, resize=40, crop=32, source="a test")
    save_backbone(tmp_path / "ours.safetensors", model.state_dict(), card)
    convert(tmp_path / "ours.safetensors", tmp_path / "hf", to="hf")
    path = tmp_path / "hf" / "config.json"
    (path.parent / "dinoscale.json").unlink()  # which has its checksum
    return path, json.loads(path.read_text())


def test_a_config_of_transformers_without_a_number_of_heads_has_that_of_the_library(
    tmp_path: Path,
) -> None:
    path, settings = _settings_of_hf(tmp_path)
    assert settings.pop("num_attention_heads") == 6
    path.write_text(json.dumps(settings))
    assert read_source(path.parent, num_heads=6).card.backbone.num_heads == 6
    with pytest.raises(CheckpointError, match="has num_heads=6, not 4; omit num_heads"):
        read_source(path.parent, num_heads=4)


def test_images_of_transformers_are_square(tmp_path: Path) -> None:
    path, settings = _settings_of_hf(tmp_path)
    for given, side in (([48, 48], 48), (40, 32), ([8, 8], 16)):
        path.write_text(json.dumps({**settings, "image_size": given}))
        assert read_source(path.parent).card.backbone.img_size == side
    for odd in ([32, 48], [], [32], "32", None, 0, True, [32, 32, 32]):
        path.write_text(json.dumps({**settings, "image_size": odd}))
        with pytest.raises(CheckpointError, match=f"image_size {re.escape(repr(odd))}, need pixel"):
            read_source(path.parent)
