"""Read ConvNeXts of DINOv3 in Hugging Face's transformers, `DINOv3ConvNextModel`.

Source: github.com/huggingface/transformers, `models/dinov3_convnext`: tensor names of saved files,
and of modules, which add `model.` but for the last norm. Its pooled features and the places of its
last map are those of our forward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dinoscale.convert.formats.convnets import convnet_name
from dinoscale.convert.formats.huggingface import completed
from dinoscale.convert.formats.reference import guess_shape, reference_card
from dinoscale.convert.read_files import Content
from dinoscale.convert.weights import Weights
from dinoscale.errors import CheckpointError

_MODEL_TYPE = "dinov3_convnext"
_STEM = "stages.0.downsample_layers.0.weight"  # of no other network of the library
_ONLY = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}  # also the library's defaults
_RENAMED = (
    (re.compile(r"^model\."), ""),
    (re.compile(r"^layer_norm\."), "norm."),
    (re.compile(r"^stages\.0\.downsample_layers\."), "stem."),
    (re.compile(r"\.downsample_layers\."), ".downsample."),
    (re.compile(r"\.layers\."), ".blocks."),
    (re.compile(r"\.depthwise_conv\."), ".conv_dw."),
    (re.compile(r"\.layer_norm\."), ".norm."),
    (re.compile(r"\.pointwise_conv(\d)\."), r".mlp.fc\1."),
)
# timm's MLPs of these are convolutions of one pixel.
_CONVOLVED = ("convnext_atto", "convnext_femto", "convnext_pico", "convnext_nano")
_MLP_WEIGHT = re.compile(r".*\.mlp\.fc\d\.weight")


def is_hf_convnext(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """Whether tensors have the names of a DINOv3ConvNextModel, or a config.json says so."""
    named = _STEM in state or f"model.{_STEM}" in state
    return settings.get("model_type") == _MODEL_TYPE or named


def read_hf_convnext(state: Mapping[str, Tensor], content: Content) -> Weights:
    """Rename the tensors of a DINOv3ConvNextModel, and read its preprocessing.

    Raises:
        CheckpointError: it is another model, of a size that we do not build, or config.json has
            options that we do not build.
    """
    settings = content.settings or {}
    for key, only in {"model_type": _MODEL_TYPE, **_ONLY}.items():
        if settings.get(key, only) != only:
            raise CheckpointError(f"has a config.json with {key} {settings[key]!r}, need {only!r}")
    backbone = from_hf_convnext(state)
    card = reference_card(guess_shape(backbone), source=content.name)
    return Weights(backbone, head=None, card=completed(card, content), kind="hf")


def from_hf_convnext(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names.

    A tensor without a counterpart keeps its name, so that `weights_file.build` refuses it.
    """
    ours = {}
    for name, tensor in state.items():
        for theirs, renamed in _RENAMED:
            name = theirs.sub(renamed, name)
        ours[name] = tensor
    if convnet_name(ours) in _CONVOLVED:
        for name, tensor in ours.items():
            if _MLP_WEIGHT.fullmatch(name) and tensor.ndim == 2:
                ours[name] = tensor[:, :, None, None]
    return ours
