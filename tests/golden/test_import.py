"""The reference's files imported: states, features and attention, whatever format they come in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import BackboneCard, BackboneShape, load_backbone, save_backbone
from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.heads import DinoHead
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.weight_names import to_reference

Golden = Callable[[str], dict[str, Tensor]]
GoldenJson = Callable[[str], dict[str, Any]]


# The whole checkpoint


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_every_tensor_of_a_full_checkpoint_is_imported(
    golden_dir: Path, golden_tensors: Golden, golden_json: GoldenJson, network: Any
) -> None:
    if not (golden_dir / "trajectory_states.safetensors").exists():
        pytest.skip("no recorded states in this folder")
    recorded = golden_tensors("trajectory_states")
    last = max(name.split(".")[0] for name in recorded)
    heads = golden_json("trajectory")["config"]["num_heads"]
    weights = read_source(golden_dir / "reference_checkpoint.pth", network=network, num_heads=heads)
    assert weights.head is not None
    found = {f"backbone.{name}": tensor for name, tensor in weights.backbone.items()}
    found |= {f"head.{name}": tensor for name, tensor in to_reference(weights.head).items()}
    prefix = f"{last}.{network}."
    expected = {n.removeprefix(prefix): t for n, t in recorded.items() if n.startswith(prefix)}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_the_head_of_a_full_checkpoint_builds_ours(
    golden_dir: Path, golden_json: GoldenJson, network: Any
) -> None:
    config = golden_json("trajectory")["config"]
    path = golden_dir / "reference_checkpoint.pth"
    weights = read_source(path, network=network, num_heads=config["num_heads"])
    assert weights.head is not None
    hidden, bottleneck = weights.head["mlp.0.weight"], weights.head["mlp.4.weight"]
    head = DinoHead(
        hidden.shape[1],
        num_prototypes=len(weights.head["last_layer.weight_v"]),
        hidden_dim=len(hidden),
        bottleneck_dim=len(bottleneck),
        num_layers=3,
        norm_last_layer="last_layer.weight_g" not in weights.head,
        batch_norm=False,
    )
    head.load_state_dict(weights.head)


# The recorded ViT, in every format


def _files(folder: Path, state: dict[str, Tensor], geometry: dict[str, Any]) -> dict[str, Path]:
    """The recorded weights as files of each kind."""
    sizes = {key: geometry[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    side, heads = geometry["img_size"], geometry["num_heads"]
    found = {name: folder / name for name in ("bare.pth", "full.pth", "ours.safetensors")}
    torch.save(state, found["bare.pth"])
    wrapped = {f"module.backbone.{name}": tensor for name, tensor in state.items()}
    torch.save({"teacher": wrapped, "epoch": 3}, found["full.pth"])
    shape = BackboneShape("vit_tiny_patch16_224", img_size=side, **sizes)
    card = BackboneCard(shape, (0.5,) * 3, (0.5,) * 3, resize=side, crop=side, source="golden")
    save_backbone(found["ours.safetensors"], state, card)

    ensure_torchvision()
    import timm
    from timm.models._hub import save_for_hf
    from transformers import ViTConfig, ViTModel

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=side, **sizes)
    model.load_state_dict(state)
    save_for_hf(model, folder / "timm", safe_serialization=True)
    settings = ViTConfig(
        hidden_size=sizes["embed_dim"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=heads,
        intermediate_size=4 * sizes["embed_dim"],
        image_size=side,
        patch_size=sizes["patch_size"],
        layer_norm_eps=geometry["norm_eps"],
    )
    ViTModel(settings, add_pooling_layer=False).save_pretrained(folder / "hf")
    save_file(_renamed(state), folder / "hf" / "model.safetensors")
    return found | {"timm": folder / "timm", "hf": folder / "hf"}


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename to the names of transformers' files."""
    inner = {
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    renamed = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        **{f"layernorm.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias")},
    }
    for name, tensor in state.items():
        kind = name.rsplit(".", 1)[-1]
        if name.startswith("patch_embed"):
            renamed[f"embeddings.patch_embeddings.projection.{kind}"] = tensor
        elif name.startswith("blocks"):
            _, number, *middle, _ = name.split(".")
            layer = f"encoder.layer.{number}"
            if middle == ["attn", "qkv"]:
                for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    renamed[f"{layer}.attention.attention.{part}.{kind}"] = rows.clone()
            else:
                renamed[f"{layer}.{inner['.'.join(middle)]}.{kind}"] = tensor
    return renamed


@pytest.mark.parametrize("kind", ["bare.pth", "full.pth", "ours.safetensors", "timm", "hf"])
def test_features_and_attention_of_every_format_are_those_recorded(
    tmp_path: Path, golden_tensors: Golden, golden_json: GoldenJson, kind: str
) -> None:
    geometry, tensors = golden_json("vit"), golden_tensors("vit")
    state = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
    path = _files(tmp_path, state, geometry)[kind]
    backbone, _ = load_backbone(path, num_heads=geometry["num_heads"])
    assert isinstance(backbone, VisionTransformer)
    backbone.double()
    sizes = [name.removesuffix(".input") for name in tensors if name.endswith(".input")]
    assert sizes
    for size in sizes:
        images = tensors[f"{size}.input"].double()
        for found, expected in (
            (backbone([images]), tensors[f"{size}.cls"]),
            (backbone.last_attention(images), tensors[f"{size}.last_attention"]),
        ):
            torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)
