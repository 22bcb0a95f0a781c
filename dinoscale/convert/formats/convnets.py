"""Read ResNets under the names of torchvision and timm, ConvNeXts under timm's or their authors'.

A ConvNeXt of its authors, and DINOv3's, which have the same names, is renamed as timm renames it
(`timm.models.convnext.checkpoint_filter_fn`); norms of other stages, which DINOv3's distillation
has stored, are no part of the network.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dinoscale.config.sections.convnets import CONVNETS, ConvNetSize
from dinoscale.errors import CheckpointError

log = logging.getLogger(__name__)

_STAGES = 4
_RENAMED = (  # of the authors
    (re.compile(r"^downsample_layers\.0\."), "stem."),
    (re.compile(r"^downsample_layers\.(\d+)\."), r"stages.\1.downsample."),
    (re.compile(r"^stages\.(\d+)\.(\d+)\."), r"stages.\1.blocks.\2."),
    (re.compile(r"\.dwconv\."), ".conv_dw."),
    (re.compile(r"\.pwconv(\d)\."), r".mlp.fc\1."),
)
_OTHER_NETWORKS = (  # tensors that they alone have, and what they are
    (re.compile(r"conv1\.0\.weight"), "a ResNet with a stem of three convolutions, as resnet50d"),
    (re.compile(r"layer1\.0\.(se|eca|attn)\..*"), "a ResNet that weighs channels, as SE-ResNets"),
    (re.compile(r"layer1\.0\.convs\.0\.weight"), "a Res2Net, whose blocks have several scales"),
    (re.compile(r"stages\.0\.blocks\.0\.(mlp\.)?grn\..*"), "a ConvNeXt V2, whose MLPs have norms"),
    (re.compile(r"stem\.2\.weight"), "a ConvNeXt whose patches overlap, as convnext_atto_ols"),
)
_OF_OTHER_STAGES = "norms."  # in checkpoints of DINOv3
BATCH_COUNT = "num_batches_tracked"  # of a batch norm, which no feature depends on


def is_convnext(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors are those of a ConvNeXt, under any of the names."""
    firsts = ("stem.0.weight", "downsample_layers.0.0.weight")
    return any(name.removeprefix("backbone.") in firsts for name in state)


def from_convnext(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a ConvNeXt under our names, which are timm's but for the last norm's.

    Returns:
        These, and the names of those that are no part of the network.
    """
    ours, outside = {}, []
    for key, tensor in state.items():
        name = key.removeprefix("backbone.")
        if name.startswith(_OF_OTHER_STAGES):
            outside.append(name)
            continue
        for old, new in _RENAMED:
            name = old.sub(new, name)
        ours[name.replace("head.norm.", "norm.")] = tensor
    return ours, outside


def with_batch_counts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and a count of 0 for each batch norm without one, as in torchvision's files."""
    norms = [name for name in state if name.endswith(".running_mean")]
    counts = {name.replace("running_mean", BATCH_COUNT): torch.tensor(0) for name in norms}
    return counts | dict(state)


def convnet_name(state: Mapping[str, Tensor]) -> str | None:
    """Name of the architecture of a convolutional network; None if the tensors are of none.

    Args:
        state: under our names.

    Raises:
        CheckpointError: it is a ResNet or a ConvNeXt of another size or kind.
    """
    if "stem.0.weight" in state:
        family, block, last = "convnext", "stages.{}.blocks.{}.", "conv_dw.weight"
        first = 0
    elif "layer1.0.conv1.weight" in state:
        family, block, first = "resnet", "layer{}.{}.", 1
        last = "conv3.weight" if "layer1.0.conv3.weight" in state else "conv2.weight"
    else:
        return None
    if (kind := _other_kind(state)) is not None:
        raise CheckpointError(f"is {kind}, which dinoscale does not build; {_built(family)}")
    depths, widths = [], []
    for stage in range(first, first + _STAGES):
        depth = 0
        while (name := block.format(stage, depth) + last) in state:
            depth += 1
        found = state.get(block.format(stage, 0) + last)
        depths.append(depth)
        widths.append(0 if found is None else found.shape[0])
    for name, size in CONVNETS.items():
        if name.startswith(family) and size == ConvNetSize((*depths,), (*widths,)):  # type: ignore[arg-type]  # four of each
            return name
    what = family
    if family == "resnet":  # named after its layers with weights
        what = f"resnet{2 + (3 if last == 'conv3.weight' else 2) * sum(depths)}"
    raise CheckpointError(
        f"is a {what} of {depths} blocks and {widths} channels, which dinoscale does not build;"
        f" {_built(family)}"
    )


def warn_of_same_tensors(name: str) -> None:
    """Say what no tensor of a ResNet shows: how its layers of stride 2 sample."""
    if name.startswith("resnet"):
        log.warning(
            "weights of a ResNet do not store its kind: assuming a plain %s; features are wrong if"
            " its strides are anti-aliased, as in timm's resnetaa50 and resnetblur50",
            name,
        )


def _built(family: str) -> str:
    return f"it builds {', '.join(name for name in CONVNETS if name.startswith(family))}"


def _other_kind(state: Mapping[str, Tensor]) -> str | None:
    """What network it is, if its layers are others than those of a ResNet or a ConvNeXt."""
    for pattern, kind in _OTHER_NETWORKS:
        if any(pattern.fullmatch(name) for name in state):
            return kind
    middle, last = (state.get(f"layer1.0.conv{number}.weight") for number in (2, 3))
    if middle is None or last is None or middle.ndim != 4:
        return None
    if middle.shape[0] != middle.shape[1]:
        return "a ResNeXt, whose convolutions are grouped"
    if 4 * middle.shape[0] != last.shape[0]:
        return "a ResNet of other widths inside its blocks, as wide_resnet50_2"
    return None
