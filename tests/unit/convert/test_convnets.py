"""ResNets and ConvNeXts in other libraries: which are read, and what is said of others."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinoscale.convert.formats.convnets import convnet_name, from_convnext, is_convnext
from dinoscale.convert.formats.hf_convnext import from_hf_convnext
from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import load_backbone
from dinoscale.errors import CheckpointError
from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.convnet import ConvNet
from dinoscale.models.zoo import build_backbone
from tests.unit.convert.scattered import scatter


def _shapes_in_timm(name: str) -> dict[str, Tensor]:
    """The tensors of timm's own network under our names, on the meta device."""
    ensure_torchvision()
    import timm

    with torch.device("meta"):
        state: dict[str, Tensor] = timm.create_model(name).state_dict()
    return from_convnext(state)[0] if is_convnext(state) else state


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "convnext_tiny"])
def test_networks_that_are_built_have_their_names(name: str) -> None:
    assert convnet_name(_shapes_in_timm(name)) == name


OTHERS = {
    "resnet50d": "a ResNet with a stem of three convolutions",
    "resnet26": r"a resnet26 of \[2, 2, 2, 2\] blocks",
    "resnext50_32x4d": "a ResNeXt",
    "wide_resnet50_2": "a ResNet of other widths inside its blocks",
    "seresnet50": "a ResNet that weighs channels",
    "convnextv2_atto": "a ConvNeXt V2",
    "convnext_atto_ols": "a ConvNeXt whose patches overlap",
}


@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_other_families_are_named_beside_those_that_are_built(name: str) -> None:
    built = "resnet18, .*resnet152" if "convnext" not in name else "convnext_atto, .*xlarge"
    said = f"is {OTHERS[name]}.*, which dinoscale does not build; it builds {built}$"
    with pytest.raises(CheckpointError, match=said):
        convnet_name(_shapes_in_timm(name))


def test_a_resnet_that_nothing_names_is_said_to_be_taken_as_a_plain_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = {
        f"layer{stage + 1}.{block}.conv{conv}.weight": torch.zeros(64 * 2**stage, 1, 1, 1)
        for stage in range(4)
        for block in range(2)
        for conv in (1, 2)
    }
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), **blocks}, tmp_path / "pytorch_model.bin")
    assert read_source(tmp_path / "pytorch_model.bin").card.backbone.name == "resnet18"
    (said,) = caplog.messages
    assert "assuming a plain resnet18; features are wrong if its strides are anti-al" in said
    caplog.clear()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnetblur18"}))
    assert read_source(tmp_path).card.backbone.name == "resnetblur18"
    assert not caplog.messages


def test_transformers_own_folders_of_dinov3s_convnexts_are_read(tmp_path: Path) -> None:
    ensure_torchvision()
    import transformers

    sizes = {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2]}
    model = transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**sizes)).eval()
    scatter(model)
    model.save_pretrained(tmp_path)
    processing = {"image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processing))
    backbone, card = load_backbone(tmp_path)
    assert isinstance(backbone, ConvNet)
    assert (backbone.name, card.mean) == ("convnext_atto", (0.1, 0.2, 0.3))
    assert "DINOv3 License" in (card.licence or "")
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        expected = model.double()(images)
        classes, places = backbone.double()([images], all_patches=True)
    assert float(classes.std(0).mean()) > 1e-3  # of images that differ
    torch.testing.assert_close(classes, expected.pooler_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(places, expected.last_hidden_state[:, 1:], rtol=0, atol=1e-5)
    torch.save(model.state_dict(), tmp_path / "modules.pth")  # names of modules
    assert read_source(tmp_path / "modules.pth").backbone.keys() == backbone.state_dict().keys()
    settings = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("hidden_act", "relu"), ("layer_norm_eps", 1e-5)):
        (tmp_path / "config.json").write_text(json.dumps({**settings, key: value}))
        with pytest.raises(CheckpointError, match=f"with {key} .*, need "):
            read_source(tmp_path)


def test_released_sizes_have_every_tensor_in_transformers() -> None:
    ensure_torchvision()
    import transformers

    with torch.device("meta"):  # the library's defaults are the smallest that DINOv3 has
        theirs = transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig()).state_dict()
        ours = build_backbone("convnext_tiny", img_size=224).state_dict()
    found = from_hf_convnext(theirs)
    assert convnet_name(found) == "convnext_tiny"
    shapes = {name: tensor.shape for name, tensor in found.items()}
    assert shapes == {name: tensor.shape for name, tensor in ours.items()}
