"""Sizes of the backbones we can describe without building them: no torch, plain arithmetic.

D is the embedding width, p the patch size in pixels, K the number of prototypes.
Source: Dosovitskiy et al. 2021 (arXiv:2010.11929), table 1; Touvron et al. 2021
(arXiv:2012.12877), table 1 for tiny and small. The names are those of timm.
"""

import itertools
import re
from dataclasses import dataclass

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

# Only the plain models: a variant (dinov2, clip, ...) may add layers, so we do not count it.
_PLAIN_VIT = re.compile(r"^(?:vit|deit)_(tiny|small|base|large)_patch\d+_\d+(?:\..+)?$")
_PATCH = re.compile(r"patch(\d+)")


@dataclass(frozen=True)
class VitSize:
    """Size of a plain ViT."""

    embed_dim: int
    depth: int
    num_heads: int


def named_vit_size(name: str) -> VitSize | None:
    """Return the size of a plain ViT by its timm name, or None if we do not know the model."""
    match = _PLAIN_VIT.match(name)
    return VitSize(*VIT_SIZES[match.group(1)]) if match else None


def named_patch_size(name: str) -> int | None:
    """Return the 16 of `vit_small_patch16_224`, in pixels; None if the name has none."""
    match = _PATCH.search(name)
    return int(match.group(1)) or None if match else None


def num_vit_parameters(
    *, img_size: int, patch_size: int, embed_dim: int, depth: int, in_chans: int = 3
) -> int:
    """Count the weights of a plain ViT with a CLS token and no classifier.

    Patch convolution C p^2 D + D, CLS token D, positions (1 + N) D, final norm 2 D, and per block
    two norms 4 D, qkv 3 D^2 + 3 D, projection D^2 + D, MLP 8 D^2 + 5 D (ratio 4).

    Args:
        img_size: side of a global crop in pixels, which sets N = (img_size / patch_size)^2.
        patch_size: p, in pixels.
        embed_dim: D.
        depth: number of blocks.
        in_chans: C, channels of an image.

    Returns:
        Number of scalars.
    """
    num_patches = (img_size // patch_size) ** 2
    block = 12 * embed_dim**2 + 13 * embed_dim
    embedding = (in_chans * patch_size**2 + 1) * embed_dim + (2 + num_patches) * embed_dim
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
