"""ResNets and ConvNeXts in other libraries: which are read, and what is said of others."""

import pytest
import torch
from torch import Tensor

from dinoscale.convert.formats.convnets import convnet_name, from_convnext, is_convnext
from dinoscale.errors import CheckpointError
from dinoscale.models._torchvision import ensure_torchvision


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
