"""Read checkpoints of the reference implementation: a backbone state and a guessed card.

Source: github.com/facebookresearch/dino, files written by its training loop (`student`, `teacher`,
`optimizer`, `epoch`, `args`, `dino_loss`) and its published backbone-only state dicts; and
github.com/facebookresearch/dinov2, its published backbones and `teacher_checkpoint.pth`.
Tensor names: wrappers of a network or a layer (data parallelism, torch.compile) add `module.`,
`_orig_mod.` and the like, the network adds `backbone.` and `head.`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoscale.config.sections.backbones import VIT_SIZES
from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.convert.formats.convnets import convnet_name
from dinoscale.convert.weights import Network
from dinoscale.errors import CheckpointError
from dinoscale.models.weight_names import from_reference

log = logging.getLogger(__name__)

HEAD_DIM = 64  # embed_dim / num_heads of every ViT of the reference
VIT_NAMES = {size[0]: f"vit_{name}" for name, size in VIT_SIZES.items()}  # by embed_dim
CONVNET_IMG_SIZE = 224  # pixels; a ResNet has no position embedding that shows it
IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)
RESIZE_TO_CROP = 256 / 224  # the reference evaluates the center 224 of 256 pixels

_MAX_CHANNELS = 4096  # of an image: hyperspectral cameras have hundreds

# Prefixes that wrappers add, anywhere in a name.
_WRAPPED = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Names of projection heads: DINO's, DINOv2's of class and patch tokens, and ours of the latter.
_HEAD = re.compile(r"(head|dino_head|ibot_head|patch_head)\.((?:mlp|last_layer)\..+)")
_OF_PATCHES = ("ibot_head", "patch_head")
# Not part of a backbone: classifiers, and the mask token of iBOT, which replaces masked patches in
# training only.
NO_BACKBONE = ("head.", "head_dist.", "fc.", "classifier.", "pooler.", "masked_embed")
_RAW = ("state_dict", "model")  # keys of training scripts for their weights
# And for the moving average of these over the steps, as in timm, DeiT and MAE.
_AVERAGED = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema")
# Tensors that only other kinds of ViTs have, and the kind.
_OTHER_KINDS = {
    "dist_token": "is a distilled DeiT, which has a second class token",
    "blocks_token_only.": "is a CaiT, whose class token enters in its last blocks only",
    "cls_attn_blocks.": "is an XCiT, whose attention is over channels",
    "norm_pre.": "has a norm before its blocks, as CLIP's ViTs",
    "blocks.0.attn.q_bias": "is a BEiT or EVA, whose queries have a bias of their own",
    "blocks.0.attn.relative_position_bias_table": "has relative positions, as BEiT",
    "blocks.0.attn.rel_pos_h": "has relative positions and windows, as SAM's ViTs",
    "layers.0.blocks.": "is a Swin or another pyramid of stages",
}
_GIANT_DIM = 1536  # embed_dim of DINOv2's largest model
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")


@dataclass(frozen=True, eq=False)
class Parts:
    """The tensors of one network: backbone and projection heads; and the names of all others."""

    backbone: dict[str, Tensor]
    head: dict[str, Tensor] | None
    patch_head: dict[str, Tensor] | None
    left_out: tuple[str, ...]


def network_state(checkpoint: object, *, network: Network) -> Mapping[str, Tensor]:
    """Take one network out of a full checkpoint; a bare state dict is that network.

    Of raw weights and their moving average (EMA), the average is the teacher and the raw weights
    are the student.

    Args:
        checkpoint: content of the file.
        network: which of the two to take from a full checkpoint.

    Returns:
        Tensors under their names in the file without the prefixes of wrappers.

    Raises:
        CheckpointError: it is no mapping, the network is not in it, or two names differ only in
            the prefixes of wrappers.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"holds a {type(checkpoint).__name__}, not named tensors")
    place = _place_of(network, checkpoint)
    tensors = checkpoint if place is None else checkpoint[place]
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"holds {key!r}, which is no tensor, where weights should be")
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            raise CheckpointError(f"holds {key!r} without its numbers, quantized or sparse")
        name = _WRAPPED.sub("", str(key))
        if name in state:
            raise CheckpointError(f"holds {name!r} twice")
        state[name] = tensor
    return state


def _place_of(network: Network, checkpoint: Mapping[str, object]) -> str | None:
    """Key of a network in a checkpoint; None if the checkpoint itself is its state dict.

    Raises:
        CheckpointError: it holds only the other network.
    """
    there = [key for key, value in checkpoint.items() if isinstance(value, Mapping)]
    if "teacher" in there or "student" in there:
        if network not in there:
            other = "student" if network == "teacher" else "teacher"
            raise CheckpointError(f"has no {network!r}, only {other!r}")
        return network
    raw, averaged = (
        next((name for name in names if name in there), None) for names in (_RAW, _AVERAGED)
    )
    if averaged is None:
        return raw
    if network == "teacher":
        if raw is not None:
            log.info(
                "of the two sets of weights in the file, taking %r (an average over steps); %r is"
                " the student",
                averaged,
                raw,
            )
        return averaged
    if raw is None:
        raise CheckpointError(f"has no {network!r}, only an average of weights, {averaged!r}")
    return raw


def is_dinov2(state: Mapping[str, Tensor]) -> bool:
    """Whether a backbone, under our names, has layers that only DINOv2's networks have."""
    return "mask_token" in state or "reg_token" in state or "blocks.0.ls1.gamma" in state


def split(state: Mapping[str, Tensor]) -> Parts:
    """Separate backbone and projection heads by their names, and remove their prefixes.

    Layers of DINOv2 get their names in timm, which are ours.

    Raises:
        CheckpointError: two names differ only in their prefixes.
    """
    backbone: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    patch_head: dict[str, Tensor] = {}
    left_out = []
    for key, tensor in state.items():
        name = _as_in_timm(key.removeprefix("backbone."))
        part, inner = backbone, name
        if match := _HEAD.fullmatch(name):
            part, inner = patch_head if match[1] in _OF_PATCHES else head, match[2]
        if inner in part:
            raise CheckpointError(f"holds {name!r} twice")
        if part is backbone and is_outside(name, tensor):
            left_out.append(name)
        else:
            part[inner] = tensor
    return Parts(
        backbone,
        our_head(head) or None,
        our_head(patch_head) or None,
        tuple(left_out),
    )


def _as_in_timm(name: str) -> str:
    """Name in timm of a tensor of DINOv2: no chunks of blocks, SwiGLU MLPs of two layers.

    Source: `timm.models.vision_transformer._convert_dinov2`.
    """
    name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)
    name = "reg_token" if name == "register_tokens" else name
    return name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def is_outside(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is no part of a backbone, such as the mask tokens of other methods."""
    return name.startswith(NO_BACKBONE) or (name == "mask_token" and tensor.ndim != 2)


def as_in_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone of ours, whose positions have the class token's slot, under DINOv2's names."""
    gated = has_gated_mlp(state)
    renamed = {}
    for name, tensor in state.items():
        name = "register_tokens" if name == "reg_token" else name
        if gated:
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        renamed[name] = tensor
    return renamed


def has_gated_mlp(state: Mapping[str, Tensor]) -> bool:
    """Whether the MLPs of a backbone of ours are SwiGLU: the first layer is twice as wide."""
    first, second = (state.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    return (
        first is not None
        and second is not None
        and (first.ndim, second.ndim) == (2, 2)
        and first.shape[0] == 2 * second.shape[1]
    )


def our_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a projection head under our names, without prototype norms that are all 1."""
    head = from_reference(state, norm_last_layer=False)
    norms = head.get("last_layer.weight_g")
    if norms is not None and bool((norms == 1).all()):
        del head["last_layer.weight_g"]
    return head


def guess_shape(
    state: Mapping[str, Tensor], *, args: object = None, num_heads: int | None = None
) -> BackboneShape:
    """Infer the architecture from the names and shapes of the tensors.

    Args:
        state: a backbone under the reference's names, or timm's for DINOv2's layers.
        args: the `argparse.Namespace` of a full checkpoint, or None.
        num_heads: no tensor shows it; used if `args` do not have it; None takes embed_dim / 64.

    Raises:
        CheckpointError: the tensors are not those of a ViT, a ResNet or a ConvNeXt.
    """
    name = convnet_name(state)
    if name is not None:
        channels = _channels(state, "conv1.weight" if "resnet" in name else "stem.0.weight")
        return BackboneShape(name=name, img_size=CONVNET_IMG_SIZE, in_chans=channels)
    return _guess_vit(state, args=args, num_heads=num_heads)


def reference_card(shape: BackboneShape, *, source: str) -> BackboneCard:
    """A card with the reference's preprocessing, for weights that do not store theirs.

    ImageNet mean and std (0 and 1 unless there are three channels), the center 224 of 256 pixels,
    in proportion at other sizes.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if shape.in_chans != len(mean):
        mean, std = (0.0,) * shape.in_chans, (1.0,) * shape.in_chans
        log.warning(
            "the weights do not store mean and std of their %d channels: assuming 0 and 1; features"
            " are wrong if the run used others",
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
    for start, what in _OTHER_KINDS.items():
        if any(name.startswith(start) for name in state):
            raise CheckpointError(f"{what}; dinoscale builds plain ViTs, ResNets and ConvNeXts")
    patches, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    blocks = [int(match.group(1)) for name in state if (match := _BLOCK.match(name))]
    if patches is None or positions is None or not blocks:
        names = ", ".join(list(state)[:3]) or "none"
        raise CheckpointError(
            f"is no ViT, ResNet or ConvNeXt that dinoscale builds (tensors: {names}, ...)"
        )
    if patches.ndim != 4 or positions.ndim != 3:
        shapes = f"{[*patches.shape]}, {[*positions.shape]}"
        raise CheckpointError(f"has patch_embed.proj.weight, pos_embed of odd shapes {shapes}")
    embed_dim, patch_size = patches.shape[0], patches.shape[-1]
    depth, stored = max(blocks) + 1, getattr(args, "num_heads", None)
    heads = stored if isinstance(stored, int) and stored > 0 else num_heads
    num_prefix, layers = _dinov2_layers(state, embed_dim=embed_dim, depth=depth)
    family = VIT_NAMES.get(embed_dim, "vit_small")  # the sizes below override the name's
    plain = f"{family}_patch{8 if patch_size == 8 else 16}_224"
    return BackboneShape(
        **{"name": plain, **layers},
        img_size=_grid(positions.shape[1] - num_prefix) * patch_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=heads or guess_heads(embed_dim, known_sizes=args is not None),
        in_chans=_channels(state, "patch_embed.proj.weight"),
    )


def _dinov2_layers(
    state: Mapping[str, Tensor], *, embed_dim: int, depth: int
) -> tuple[int, dict[str, Any]]:
    """Slots of pos_embed before the patches, and what DINOv2's layers add to a BackboneShape.

    With registers, timm has no slot for the class token, whose position is added to the token.
    """
    tokens, gated = state.get("reg_token"), has_gated_mlp(state)
    num_registers = tokens.shape[1] if tokens is not None and tokens.ndim == 3 else 0
    in_timm = num_registers > 0 and math.isqrt(state["pos_embed"].shape[1]) ** 2 == len(
        state["pos_embed"][0]
    )
    layers: dict[str, Any] = {"mask_token": "mask_token" in state}
    if num_registers and not in_timm:
        layers["registers"] = num_registers
    if f"blocks.{depth - 1}.ls2.gamma" in state:  # layer scale, which the named models have
        giant = embed_dim == _GIANT_DIM and gated
        family = "vit_giant" if giant else VIT_NAMES.get(embed_dim, "vit_small")
        layers["name"] = f"{family}_patch14{'_reg4' if in_timm else ''}_dinov2"
        gated = gated and not giant
    if gated:
        layers["ffn"] = "swiglu"
    return (0 if in_timm else 1), layers


def _grid(num_patches: int) -> int:
    """Number of patches along one side of a square."""
    side = math.isqrt(max(num_patches, 0))
    if side < 1 or side * side != num_patches:
        raise CheckpointError(f"has a pos_embed of {num_patches} patches, which is no square grid")
    return side


def _channels(state: Mapping[str, Tensor], name: str) -> int:
    """C of the first convolution, (D, C, p, p)."""
    tensor = state.get(name)
    if tensor is None or tensor.ndim != 4 or not 1 <= tensor.shape[1] <= _MAX_CHANNELS:
        found = None if tensor is None else [*tensor.shape]
        raise CheckpointError(
            f"has a {name} of shape {found}, need (D, C, p, p) with 1 <= C <= {_MAX_CHANNELS}"
        )
    return tensor.shape[1]


def guess_heads(embed_dim: int, *, known_sizes: bool = False, head_dim: int = HEAD_DIM) -> int:
    """Number of heads at so many channels each, with a warning that it is a guess.

    Args:
        embed_dim: of the backbone.
        known_sizes: whether a run of the reference wrote the file, which has no other sizes.
        head_dim: channels of a head in the released models.

    Raises:
        CheckpointError: the width is not a multiple of them.
    """
    if embed_dim % head_dim:
        raise CheckpointError(
            f"has embed_dim {embed_dim}, from which the number of heads cannot be guessed: "
            "give num_heads"
        )
    if not known_sizes or embed_dim not in VIT_NAMES:
        log.warning(
            "weights of embed_dim %d do not store their number of heads: assuming num_heads=%d as"
            " in the reference; features are wrong if the run used another number",
            embed_dim,
            embed_dim // head_dim,
        )
    return embed_dim // head_dim
