"""Read checkpoints of ResNets and ConvNeXts, under the names of torchvision, timm or the authors.

A ConvNeXt of its authors, and DINOv3's, which have the same names, is renamed as timm renames it
(`timm.models.convnext.checkpoint_filter_fn`); norms of other stages, which DINOv3's distillation
has stored, are no part of the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dinoscale.config.sections.convnets import CONVNETS, ConvNetSize
from dinoscale.errors import CheckpointError

_STAGES = 4
_RENAMED = (  # of the authors
    (re.compile(r"^downsample_layers\.0\."), "stem."),
    (re.compile(r"^downsample_layers\.(\d+)\."), r"stages.\1.downsample."),
    (re.compile(r"^stages\.(\d+)\.(\d+)\."), r"stages.\1.blocks.\2."),
    (re.compile(r"\.dwconv\."), ".conv_dw."),
    (re.compile(r"\.pwconv(\d)\."), r".mlp.fc\1."),
)
_OF_OTHER_STAGES = "norms."  # in checkpoints of DINOv3


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


def convnet_name(state: Mapping[str, Tensor]) -> str | None:
    """Name of the architecture of a convolutional network; None if the tensors are of none.

    Args:
        state: under our names.

    Raises:
        CheckpointError: it is a ResNet or a ConvNeXt of another size.
    """
    if "stem.0.weight" in state:
        family, block, last = "convnext", "stages.{}.blocks.{}.", "conv_dw.weight"
        first = 0
    elif "layer1.0.conv1.weight" in state:
        family, block, first = "resnet", "layer{}.{}.", 1
        last = "conv3.weight" if "layer1.0.conv3.weight" in state else "conv2.weight"
    else:
        return None
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
    raise CheckpointError(
        f"is a {family} of {depths} blocks and {widths} channels, which is none of those that"
        f" dinoscale builds: {', '.join(name for name in CONVNETS if name.startswith(family))}"
    )
