"""Sizes of the convolutional networks that we can describe without building them.

Source: He et al. 2016 (arXiv:1512.03385), table 1; Liu et al. 2022 (arXiv:2201.03545), section 3;
the five smallest ConvNeXts are timm's.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvNetSize:
    """Size of a ResNet or a ConvNeXt.

    Attributes:
        depths: blocks of each of the four stages.
        widths: channels that each stage returns.
    """

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]


STRIDE = 32  # pixels of an image along a side of a place of the last map

_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
_TINY = (96, 192, 384, 768)

CONVNETS: dict[str, ConvNetSize] = {
    "resnet18": ConvNetSize((2, 2, 2, 2), _BASIC),
    "resnet34": ConvNetSize((3, 4, 6, 3), _BASIC),
    "resnet50": ConvNetSize((3, 4, 6, 3), _BOTTLENECK),
    "resnet101": ConvNetSize((3, 4, 23, 3), _BOTTLENECK),
    "resnet152": ConvNetSize((3, 8, 36, 3), _BOTTLENECK),
    "convnext_atto": ConvNetSize((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnext_femto": ConvNetSize((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnext_pico": ConvNetSize((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnext_nano": ConvNetSize((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnext_tiny": ConvNetSize((3, 3, 9, 3), _TINY),
    "convnext_small": ConvNetSize((3, 3, 27, 3), _TINY),
    "convnext_base": ConvNetSize((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ConvNetSize((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": ConvNetSize((3, 3, 27, 3), (256, 512, 1024, 2048)),
}


def named_convnet(name: str) -> ConvNetSize | None:
    """Return the size of a network by its name in timm, with or without a tag of weights.

    Returns:
        The size; None if it is no convolutional network that we know.
    """
    return CONVNETS.get(name.partition(".")[0])
