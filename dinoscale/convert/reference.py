"""Checkpoints of the reference implementation, read into a backbone state and a guessed card.

Source: github.com/facebookresearch/dino, files written by its training loop (`student`, `teacher`,
`optimizer`, `epoch`, `args`, `dino_loss`) and its published backbone-only state dicts.
Tensor names: `module.` is added by data-parallel wrappers, `backbone.` and `head.` by the network.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dinoscale.config.backbones import VIT_SIZES
from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.convert.weights import Network
from dinoscale.errors import CheckpointError
from dinoscale.models.weights import from_reference

log = logging.getLogger(__name__)

HEAD_DIM = 64  # embed_dim / num_heads of every ViT of the reference
VIT_NAMES = {size[0]: f"vit_{name}" for name, size in VIT_SIZES.items()}  # by embed_dim
RESNET50_IMG_SIZE = 224  # pixels; a ResNet has no positional embedding to tell
IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)
RESIZE_TO_CROP = 256 / 224  # the reference evaluates the center 224 of 256 pixels

_MOST_CHANNELS = 4096  # of an image: hyperspectral cameras have hundreds

_PREFIXES = ("module.", "backbone.")
_HEAD = re.compile(r"head\.(mlp|last_layer)\.")  # names of the projection head
_CLASSIFIER = ("head.", "fc.")  # of a supervised ViT and ResNet: no part of the backbone
_WRAPPERS = ("state_dict", "model")  # what training scripts put around their tensors
_GIANT_DIM = 1536  # embed_dim of DINOv2's largest model
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")


@dataclass(frozen=True, eq=False)
class Parts:
    """The tensors of one network: backbone, projection head, and names of neither."""

    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    left_out: tuple[str, ...]


def network_state(checkpoint: object, *, network: Network) -> Mapping[str, Tensor]:
    """Take one network out of a full checkpoint; a bare state dict is that network.

    Args:
        checkpoint: what the file held.
        network: which of the two to take from a full checkpoint.

    Returns:
        Named tensors, as in the file.

    Raises:
        CheckpointError: it is no mapping, or the network is not in it.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"holds a {type(checkpoint).__name__}, not named tensors")
    found = [name for name in ("teacher", "student") if isinstance(checkpoint.get(name), Mapping)]
    if found and network not in found:
        raise CheckpointError(f"has no {network!r}, only {found[0]!r}")
    wrapped = [name for name in _WRAPPERS if isinstance(checkpoint.get(name), Mapping)]
    tensors = checkpoint
    if found or wrapped:
        tensors = checkpoint[network if found else wrapped[0]]
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"holds {key!r}, which is no tensor, where weights should be")
    return {str(key): tensor for key, tensor in tensors.items()}


def split(state: Mapping[str, Tensor]) -> Parts:
    """Tell backbone and projection head apart by their names, and take their prefixes off.

    Raises:
        CheckpointError: two names differ in their prefixes only.
    """
    backbone: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    left_out = []
    for key, tensor in state.items():
        name = key
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        part, inner = (head, name.removeprefix("head.")) if _HEAD.match(name) else (backbone, name)
        if inner in part:
            raise CheckpointError(f"holds {name!r} twice")
        if part is backbone and name.startswith(_CLASSIFIER):
            left_out.append(name)
        else:
            part[inner] = tensor
    return Parts(backbone, our_head(head), tuple(left_out))


def our_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a projection head under our names; prototype norms that are all 1 are left out."""
    head = from_reference(state, norm_last_layer=False)
    norms = head.get("last_layer.weight_g")
    if norms is not None and bool((norms == 1).all()):
        del head["last_layer.weight_g"]
    return head


def guess_shape(
    state: Mapping[str, Tensor], *, args: object = None, num_heads: int | None = None
) -> BackboneShape:
    """Read the architecture off the names and shapes of the tensors.

    Args:
        state: a backbone under the reference's names, or those timm gives DINOv2's layers.
        args: the `argparse.Namespace` of a full checkpoint, or None.
        num_heads: no tensor tells it; None takes it from `args`, else embed_dim / 64.

    Raises:
        CheckpointError: the tensors are not those of a ViT or a ResNet-50.
    """
    if "layer4.2.conv3.weight" in state and "layer3.5.conv3.weight" in state:
        channels = _channels(state, "conv1.weight")
        return BackboneShape(name="resnet50", img_size=RESNET50_IMG_SIZE, in_chans=channels)
    return _guess_vit(state, args=args, num_heads=num_heads)


def reference_card(shape: BackboneShape, *, source: str) -> BackboneCard:
    """Preprocessing of weights that do not tell theirs: the reference's.

    ImageNet mean and std (of other than three channels: 0 and 1), the center 224 of 256 pixels, in
    proportion at other sizes.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if shape.in_chans != len(mean):
        mean, std = (0.0,) * shape.in_chans, (1.0,) * shape.in_chans
        log.warning(
            "the weights do not tell mean and std of their %d channels: assuming 0 and 1; features "
            "are wrong if the run used others",
            shape.in_chans,
        )
    return BackboneCard(
        backbone=shape,
        mean=mean,
        std=std,
        resize=round(shape.img_size * RESIZE_TO_CROP),
        crop=shape.img_size,
        source=source,
    )


def _guess_vit(
    state: Mapping[str, Tensor], *, args: object, num_heads: int | None
) -> BackboneShape:
    """Sizes of a ViT from patch_embed (D, C, p, p), pos_embed (1, 1 + N, D) and the block names."""
    patches, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    blocks = [int(match.group(1)) for name in state if (match := _BLOCK.match(name))]
    if patches is None or positions is None or not blocks:
        names = ", ".join(list(state)[:3]) or "none"
        raise CheckpointError(f"is no ViT or ResNet-50 of the reference (tensors: {names}, ...)")
    if patches.ndim != 4 or positions.ndim != 3:
        shapes = f"{[*patches.shape]}, {[*positions.shape]}"
        raise CheckpointError(f"has patch_embed.proj.weight, pos_embed of odd shapes {shapes}")
    embed_dim, patch_size = patches.shape[0], patches.shape[-1]
    depth = max(blocks) + 1
    family = VIT_NAMES.get(embed_dim, "vit_small")  # the sizes below override the name's
    name = f"{family}_patch{8 if patch_size == 8 else 16}_224"
    num_prefix = 1
    if f"blocks.{depth - 1}.ls2.gamma" in state:  # layer scale, which only DINOv2's models have
        family = "vit_giant" if embed_dim == _GIANT_DIM else family
        name = f"{family}_patch14{'_reg4' if 'reg_token' in state else ''}_dinov2"
        num_prefix = 0 if "reg_token" in state else 1  # timm adds the class token's slot to it
    return BackboneShape(
        name=name,
        img_size=_grid(positions.shape[1] - num_prefix) * patch_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads or _guess_heads(embed_dim, args=args),
        in_chans=_channels(state, "patch_embed.proj.weight"),
    )


def _grid(num_patches: int) -> int:
    """Side of a square of so many patches."""
    side = math.isqrt(max(num_patches, 0))
    if side < 1 or side * side != num_patches:
        raise CheckpointError(f"has a pos_embed of {num_patches} patches, which is no square grid")
    return side


def _channels(state: Mapping[str, Tensor], name: str) -> int:
    """C of a convolution (D, C, p, p) at the image."""
    tensor = state.get(name)
    if tensor is None or tensor.ndim != 4 or not 1 <= tensor.shape[1] <= _MOST_CHANNELS:
        found = None if tensor is None else [*tensor.shape]
        raise CheckpointError(f"has a {name} of shape {found}, which tells no number of channels")
    return tensor.shape[1]


def _guess_heads(embed_dim: int, *, args: object) -> int:
    """Heads from the settings of the run, else 64 channels a head as in the reference."""
    told = getattr(args, "num_heads", None)
    if isinstance(told, int) and told > 0:
        return told
    if embed_dim % HEAD_DIM:
        raise CheckpointError(
            f"has embed_dim {embed_dim}, from which the number of heads cannot be guessed: "
            "give num_heads"
        )
    if embed_dim not in VIT_NAMES:
        log.warning(
            "embed_dim %d is none of the reference's sizes: assuming num_heads=%d, which weights "
            "do not tell; features are wrong if the run used another number",
            embed_dim,
            embed_dim // HEAD_DIM,
        )
    return embed_dim // HEAD_DIM
