"""Sizes of the backbones we can describe without building them: no torch, plain arithmetic.

D is the embedding width, p the patch size in pixels, K the number of prototypes.
Source: Dosovitskiy et al. 2021 (arXiv:2010.11929), table 1; Touvron et al. 2021
(arXiv:2012.12877), table 1 for tiny and small; Oquab et al. 2023 (arXiv:2304.07193) for giant. The
names are those of timm.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Literal

RESNET50 = "resnet50"
RESNET50_EMBED_DIM = 2048  # channels of the last stage, averaged over the image
RESNET50_PARAMETERS = (
    23_508_032  # of RGB, He et al. 2015 (arXiv:1512.03385), without the classifier
)

RESNET50_PER_CHANNEL = 7 * 7 * 64  # of them, in the first convolution

# size name -> (embed_dim, depth, num_heads)
VIT_SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}

# Only the models whose layers we know: another variant (clip, ...) may add some.
_PLAIN_VIT = re.compile(r"^(?:vit|deit)_(tiny|small|base|large)_patch\d+_\d+(?:\..+)?$")
_DINOV2 = re.compile(r"^vit_(small|base|large|giant)_patch14_(reg4_)?dinov2(?:\..+)?$")
_GIANT = (1536, 40, 24)  # of DINOv2 only
_PATCH = re.compile(r"patch(\d+)")


@dataclass(frozen=True)
class VitSize:
    """Size of a ViT, and which of DINOv2's layers it has.

    Attributes:
        embed_dim: D.
        depth: blocks.
        num_heads: of attention.
        layer_scale: whether a factor per channel scales each residual branch.
        ffn: kind of MLP.
        registers: register tokens, where the position embedding has no slot for the class token.
    """

    embed_dim: int
    depth: int
    num_heads: int
    layer_scale: bool = False
    ffn: Literal["mlp", "swiglu"] = "mlp"
    registers: int = 0


def named_vit_size(name: str) -> VitSize | None:
    """Return the size of a ViT by its timm name, or None if we do not know the model."""
    if match := _PLAIN_VIT.match(name):
        return VitSize(*VIT_SIZES[match.group(1)])
    if match := _DINOV2.match(name):
        is_giant = match.group(1) == "giant"
        return VitSize(
            *(_GIANT if is_giant else VIT_SIZES[match.group(1)]),
            layer_scale=True,
            ffn="swiglu" if is_giant else "mlp",
            registers=4 if match.group(2) else 0,
        )
    return None


def named_patch_size(name: str) -> int | None:
    """Return the 16 of `vit_small_patch16_224`, in pixels; None if the name has none."""
    match = _PATCH.search(name)
    return int(match.group(1)) or None if match else None


def num_vit_parameters(
    *,
    img_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    in_chans: int = 3,
    layer_scale: bool = False,
    ffn: Literal["mlp", "swiglu"] = "mlp",
    registers: int = 0,
    class_position: bool = True,
    mask_token: bool = False,
) -> int:
    """Count the weights of a ViT with a CLS token and no classifier.

    Patch convolution C p^2 D + D, CLS token, registers and mask token D each, positions (1 + N) D,
    final norm 2 D, and per block two norms 4 D, qkv 3 D^2 + 3 D, projection D^2 + D, MLP 8 D^2 +
    5 D (ratio 4) or SwiGLU 3 H D + 2 H + D, layer scale 2 D.

    Args:
        img_size: side of a global crop in pixels, which sets N = (img_size / patch_size)^2.
        patch_size: p, in pixels.
        embed_dim: D.
        depth: number of blocks.
        in_chans: C, channels of an image.
        layer_scale: whether a factor per channel scales each residual branch.
        ffn: kind of MLP; H of SwiGLU is two thirds of 4 D, rounded up to a multiple of 8.
        registers: register tokens, which have no positions.
        class_position: whether the CLS token has one.
        mask_token: whether there is a mask token.

    Returns:
        Number of scalars.
    """
    tokens = (img_size // patch_size) ** 2 + class_position + 1 + registers + mask_token
    hidden = (int(4 * embed_dim * 2 / 3) + 7) // 8 * 8
    feed_forward = {
        "mlp": 8 * embed_dim**2 + 5 * embed_dim,
        "swiglu": 3 * hidden * embed_dim + 2 * hidden + embed_dim,
    }
    norms_and_scales = (6 if layer_scale else 4) * embed_dim
    block = 4 * embed_dim**2 + 4 * embed_dim + feed_forward[ffn] + norms_and_scales
    embedding = (in_chans * patch_size**2 + 1) * embed_dim + tokens * embed_dim
    return embedding + depth * block + 2 * embed_dim


def num_head_parameters(
    *,
    in_dim: int,
    num_prototypes: int,
    hidden_dim: int,
    bottleneck_dim: int,
    num_layers: int,
    batch_norm: bool,
) -> int:
    """Count the weights of the DINO head, the K prototype lengths (`weight_g`) included.

    Args:
        in_dim: width D of the backbone's output.
        num_prototypes: K.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width before the prototypes.
        num_layers: linear layers of the MLP; 1 is a single layer in_dim -> bottleneck_dim.
        batch_norm: adds a scale and a shift per unit of each hidden layer.

    Returns:
        Number of scalars.
    """
    hidden = [hidden_dim] * (num_layers - 1)
    widths = [in_dim, *hidden, bottleneck_dim]
    mlp = sum(wide * out + out for wide, out in itertools.pairwise(widths))
    norms = 2 * sum(hidden) if batch_norm else 0
    return mlp + norms + num_prototypes * bottleneck_dim + num_prototypes
