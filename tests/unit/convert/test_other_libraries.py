"""Weights of timm and transformers give the same features here as there."""

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import build, load_backbone
from dinoscale.errors import CheckpointError
from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.vit import VisionTransformer
from tests.unit.convert.scattered import scatter

# Networks are compared in float64, where nothing but their arithmetic differs.
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _timm(name: str = "vit_tiny_patch16_224", **changed: Any) -> nn.Module:
    ensure_torchvision()
    import timm

    model = timm.create_model(name, **{"num_classes": 5, **SIZES, **changed}).eval()
    scatter(model)
    return model  # type: ignore[no-any-return]  # timm is not typed


def _hub_folder(folder: Path, model: nn.Module, **pretrained_cfg: object) -> Path:
    from timm.models._hub import save_for_hf

    save_for_hf(model, folder, safe_serialization="both")
    settings = json.loads((folder / "config.json").read_text())
    settings["pretrained_cfg"] |= pretrained_cfg
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def _vit(path: Path, **options: Any) -> VisionTransformer:
    backbone, _ = load_backbone(path, **options)
    assert isinstance(backbone, VisionTransformer)
    return backbone.double()


def _timm_tokens(model: Any) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double().forward_features(IMAGES)  # type: ignore[no-any-return]  # timm is not typed


# timm


def test_a_timm_folder_gives_its_features_and_preprocessing(tmp_path: Path) -> None:
    model = _timm()
    folder = _hub_folder(tmp_path / "vit", model, crop_pct=0.8, mean=[0.1, 0.2, 0.3], std=[1] * 3)
    weights = read_source(folder)
    assert (weights.kind, weights.head) == ("timm", None)
    assert sorted(weights.left_out) == ["head.bias", "head.weight"]
    assert weights.card.mean == (0.1, 0.2, 0.3)
    assert (weights.card.crop, weights.card.resize) == (32, 40)
    assert weights.card.backbone.num_heads == 3
    torch.testing.assert_close(_vit(folder).features(IMAGES), _timm_tokens(model))


def test_missing_entries_of_a_timm_config_get_timms_defaults(tmp_path: Path) -> None:
    folder = _hub_folder(tmp_path / "vit", _timm(), crop_pct=None, mean=None, std=[0.1] * 3)
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    resize, _ = timm.data.create_transform(**config).transforms[:2]
    card = read_source(folder).card
    assert (card.resize, card.mean, card.std) == (resize.size, config["mean"], (0.1,) * 3)
    assert card.resize == 36


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_file_is_read_with_the_settings_beside_it(tmp_path: Path, name: str) -> None:
    folder = _hub_folder(tmp_path, _timm())
    assert read_source(folder / name).card.mean == (0.5, 0.5, 0.5)


def test_a_bare_timm_state_dict_is_read_as_the_references(tmp_path: Path) -> None:
    model = _timm(num_classes=0)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    for path in (tmp_path / "w.pth", tmp_path / "w.safetensors"):
        torch.testing.assert_close(_vit(path, num_heads=3).features(IMAGES), _timm_tokens(model))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2_models_of_timm_are_recognised_by_their_layers(tmp_path: Path, name: str) -> None:
    model = _timm(name, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbone = _vit(tmp_path / "w.pth", num_heads=3)
    assert read_source(tmp_path / "w.pth", num_heads=3).kind == "timm"
    torch.testing.assert_close(backbone.features(IMAGES), _timm_tokens(model))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_published_dinov2_backbones_are_read(tmp_path: Path, name: str) -> None:
    model = _timm(name, num_classes=0)
    state = dict(model.state_dict())
    if "reg_token" in state:  # there the class token's position is one of the others
        state["register_tokens"] = state.pop("reg_token")
        shift = torch.randn_like(state["cls_token"])
        state["cls_token"] = state["cls_token"] - shift
        state["pos_embed"] = torch.cat((shift, state["pos_embed"]), dim=1)
    state["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    chunked = {re.sub(r"^(blocks)\.", r"\1.0.", key): value for key, value in state.items()}
    training = {f"backbone.{key}": value for key, value in chunked.items()}
    training["dino_head.mlp.0.weight"] = torch.zeros(2, 2)
    training["fc.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "published.pth")
    torch.save({"teacher": training}, tmp_path / "training.pth")
    for file in ("published.pth", "training.pth"):
        weights = read_source(tmp_path / file, num_heads=3)
        assert weights.left_out == (("fc.weight",) if file == "training.pth" else ())
        assert (weights.head is not None) == (file == "training.pth")
        assert weights.card.backbone.name == "vit_small_patch14_dinov2"
        assert weights.card.backbone.registers == (4 if "reg4" in name else None)
        assert weights.card.backbone.mask_token
        found = build(weights)[0].double().features(IMAGES)
        # Its class token was moved to and fro in float32.
        torch.testing.assert_close(found.float(), _timm_tokens(model).float())


def test_gated_layers_of_dinov2_have_other_names_in_timm(tmp_path: Path) -> None:
    import timm

    with torch.device("meta"):
        wanted = timm.create_model("vit_giant_patch14_dinov2", num_classes=0, depth=1).state_dict()
    theirs = {
        name.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): torch.zeros(()).expand(
            x.shape
        )
        for name, x in wanted.items()
    }
    torch.save(theirs, tmp_path / "w.pth")
    assert "blocks.0.mlp.w12.weight" in theirs
    weights = read_source(tmp_path / "w.pth")
    assert weights.card.backbone.name == "vit_giant_patch14_dinov2"
    assert {name: x.shape for name, x in weights.backbone.items()} == {
        name: x.shape for name, x in wanted.items()
    }


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("deit_tiny_distilled_patch16_224", "distilled DeiT, which has a second class token"),
        ("cait_xxs24_224", "is a CaiT, whose class token"),
        ("xcit_nano_12_p16_224", "is an XCiT"),
        ("beit_base_patch16_224", "is a BEiT"),
        ("swin_tiny_patch4_window7_224", "is a Swin"),
        ("vit_base_patch16_clip_224", "a norm before its blocks"),
    ],
)
def test_other_networks_are_refused_by_kind(tmp_path: Path, name: str, says: str) -> None:
    import timm

    with torch.device("meta"):
        state = timm.create_model(name, pretrained=False).state_dict()
    kept = {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}
    torch.save(kept, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"{says}.*; dinoscale builds plain ViTs"):
        load_backbone(tmp_path / "w.pth")


def test_registers_are_refused_by_a_model_without_them(tmp_path: Path) -> None:
    folder = _hub_folder(tmp_path, _timm("vit_small_patch14_reg4_dinov2", num_classes=0))
    settings = json.loads((folder / "config.json").read_text())
    settings["architecture"] = "vit_small_patch14_dinov2"
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        CheckpointError, match=r"unexpected: reg_token; of another shape or type: pos"
    ):
        load_backbone(folder)


def test_an_almost_empty_load_is_refused_and_counted(tmp_path: Path) -> None:
    state = _timm(num_classes=0).state_dict()
    renamed = {f"model.{name}": tensor for name, tensor in state.items()}
    kept = ("patch_embed.proj.weight", "pos_embed", "blocks.1.norm1.weight")
    torch.save(renamed | {name: state[name] for name in kept}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"3 of 30 tensors fit; missing: cls_token.*unexpec"):
        load_backbone(tmp_path / "w.pth", num_heads=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_args": {"act_layer": "relu"}}, "act_layer"),
        ({"model_args": [1]}, "no mappings"),
        ({"pretrained_cfg": {"crop_pct": "0.9"}}, "crop_pct"),
        ({"pretrained_cfg": {"input_size": [3, "x", 1]}}, "input_size"),
        ({"pretrained_cfg": {"input_size": [3, 32, 40]}}, "which is no square"),
        ({"pretrained_cfg": {"mean": ["a"], "std": [1]}}, "mean"),
        ({"architecture": 7}, "name is 7"),
        ({"architecture": "vit_tinny_patch16_224"}, "unknown model 'vit_tinny_patch16_224'"),
        ({"architecture": "vit_base_patch16_siglip_224"}, "class token"),
    ],
)
def test_odd_settings_of_timm_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = _hub_folder(tmp_path, _timm(num_classes=0))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(CheckpointError, match=message):
        load_backbone(folder)


# transformers


def _transformers(folder: Path, *, classifier: bool = False, **settings: Any) -> Any:
    """A ViT of transformers with scattered weights, saved in a folder."""
    ensure_torchvision()
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 192,
        "image_size": 32,
        "patch_size": 8,
    }
    model = (ViTForImageClassification if classifier else ViTModel)(ViTConfig(**sizes | settings))
    scatter(model)
    model.eval().save_pretrained(folder)
    return model


def _their_tokens(model: Any) -> Tensor:
    with torch.no_grad():
        model = copy.deepcopy(getattr(model, "vit", model)).double()
        return model(IMAGES).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
def test_a_transformers_folder_gives_its_features(
    tmp_path: Path, classifier: bool, eps: float
) -> None:
    model = _transformers(tmp_path, classifier=classifier, layer_norm_eps=eps)
    weights = read_source(tmp_path)
    assert (weights.kind, weights.head, weights.card.backbone.norm_eps) == ("hf", None, eps)
    assert all(name.startswith(("pooler", "classifier")) for name in weights.left_out)
    ours = _vit(tmp_path).features(IMAGES)
    torch.testing.assert_close(ours, _their_tokens(model))


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("told", [True, False])
def test_dinov2_folders_of_transformers_give_their_features(
    tmp_path: Path, registers: int, *, told: bool
) -> None:
    ensure_torchvision()
    import transformers

    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    scatter(model)
    model.save_pretrained(tmp_path)
    if not told:  # by the names of the tensors, then
        (tmp_path / "config.json").unlink()
    weights = read_source(tmp_path, num_heads=None if told else 3)
    assert (weights.kind, weights.left_out) == ("hf", ())
    assert "mask_token" in weights.backbone
    assert weights.card.backbone.norm_eps == 1e-6
    ours = build(weights)[0].double().features(IMAGES)
    torch.testing.assert_close(ours, _their_tokens(model))


def test_sizes_of_an_image_processor_are_taken_if_we_can_do_the_same(tmp_path: Path) -> None:
    _transformers(tmp_path)
    told: dict[str, Any] = {"size": {"shortest_edge": 41}, "crop_size": {"height": 32, "width": 32}}
    path = tmp_path / "preprocessor_config.json"
    for change, found in (
        ({"do_center_crop": True}, (41, 32)),
        ({"do_center_crop": False}, (37, 32)),
        ({"do_center_crop": True, "size": {"height": 41, "width": 41}}, (37, 32)),
    ):
        path.write_text(json.dumps(told | change))
        card = read_source(tmp_path).card
        assert (card.resize, card.crop) == found
    path.write_text(json.dumps({"do_normalize": False, "image_mean": [0.1] * 3}))
    assert read_source(tmp_path).card.mean == (0.0,) * 3
    path.write_text(json.dumps({"image_std": [0.1] * 3}))
    assert read_source(tmp_path).card.std == (0.1,) * 3


def test_a_bare_file_of_transformers_is_recognised_by_its_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = _transformers(tmp_path)
    old_names = load_file(tmp_path / "model.safetensors")
    save_file(old_names, tmp_path / "bare.safetensors")
    torch.save(model.state_dict(), tmp_path / "bare.bin")  # names of its modules, since version 5
    for name in ("bare.safetensors", "bare.bin"):
        ours = _vit(tmp_path / name, num_heads=3).features(IMAGES)
        torch.testing.assert_close(ours, _their_tokens(model))
    assert "layer_norm_eps 1e-12" in caplog.text


def test_sharded_files_of_transformers_are_joined(tmp_path: Path) -> None:
    model = _transformers(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    assert index.exists()
    whole, parts = read_source(tmp_path / "whole"), read_source(tmp_path / "parts")
    assert parts.card.backbone == whole.card.backbone
    assert parts.backbone.keys() == whole.backbone.keys()
    assert all(torch.equal(parts.backbone[name], whole.backbone[name]) for name in parts.backbone)

    good = json.loads(index.read_text())
    places = good["weight_map"]
    first = sorted(set(places.values()))[0]
    bad_maps = [
        ({**places, "vit.more": first}, "disagrees with its files about vit.more"),
        ({**places, "more": "../whole/model.safetensors"}, "no safetensors file beside it"),
        ({**places, "more": "model-9.safetensors"}, "lacks 'model-9.safetensors'"),
        ({**places, "more": 3}, "without a weight_map"),
    ]
    for weight_map, message in bad_maps:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            read_source(tmp_path / "parts")


def test_preprocessing_of_transformers_is_read_with_a_warning_for_mean_0_5(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _transformers(tmp_path)
    assert read_source(tmp_path).card.mean == (0.485, 0.456, 0.406)
    told: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    card = read_source(tmp_path).card
    assert (card.mean, card.std, card.resize, card.crop) == ((0.5,) * 3, (0.25,) * 3, 37, 32)
    assert "facebook/dino-vit" in caplog.text
    caplog.clear()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told | {"image_mean": [0.4] * 3}))
    with caplog.at_level(logging.WARNING):
        assert read_source(tmp_path).card.mean == (0.4,) * 3
    assert not caplog.text
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json that is no mapping"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "dinov2"}, "model_type 'dinov2', need 'vit'"),
        ({"model_type": "convnext"}, "model_type 'convnext'; .* reads vit, dinov2, .*convnext$"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"layer_norm_eps": "small"}, "norm_eps is 'small'"),
        ({"num_attention_heads": [3]}, "num_heads is"),
        ({"num_attention_heads": 5}, "cannot be built"),
    ],
)
def test_odd_settings_of_transformers_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _transformers(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path)


def test_tensors_of_transformers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    _transformers(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    key = "encoder.layer.1.attention.attention.key.weight"
    save_file({**state, "encoder.layer.1.gate": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"30 of 30 .*unexpected: encoder\.layer\.1\.gate"):
        load_backbone(tmp_path)
    save_file({name: tensor for name, tensor in state.items() if name != key}, path)
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\.attn\.qkv\.weight; unexpected"):
        load_backbone(tmp_path)
    save_file({**state, key: torch.zeros(48, 47)}, path)
    with pytest.raises(CheckpointError, match="q, k and v of different widths"):
        load_backbone(tmp_path)


def test_models_without_biases_are_refused_by_name(tmp_path: Path) -> None:
    _transformers(tmp_path, qkv_bias=False)
    with pytest.raises(CheckpointError, match=r"missing: blocks\.0\.attn\.qkv\.bias"):
        load_backbone(tmp_path)
