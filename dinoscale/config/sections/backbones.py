"""Settings of the backbone, and sizes of those we can describe without building them.

D is the embedding width, p the patch size in pixels, K the number of prototypes.
Source: Dosovitskiy et al. 2021 (arXiv:2010.11929), table 1; Touvron et al. 2021
(arXiv:2012.12877), table 1 for tiny and small; Oquab et al. 2023 (arXiv:2304.07193) for giant;
Simeoni et al. 2025 (arXiv:2508.10104) for DINOv3's. The names are those of timm; [C] code of Caron
et al. 2021 (arXiv:2104.14294), its command-line defaults.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, model_validator

from dinoscale.config.sections.convnets import CONVNETS, ConvNetSize, named_convnet
from dinoscale.config.sections.fields import Count, CountOrZero, Positive, PositiveOrZero, Section

RESNET50 = "resnet50"
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
_DINOV3 = re.compile(
    r"^vit_(small|small_plus|base|large|huge_plus|7b)_patch16_dinov3(_qkvb)?(?:\..+)?$"
)
_DINOV3_SIZES = {  # those that have a SwiGLU -> size, ratio of an MLP as wide, multiple of
    "small_plus": ((384, 12, 6), 6.0, 8),
    "huge_plus": ((1280, 32, 20), 6.0, 8),
    "7b": ((4096, 40, 32), 3.0, 64),
}
_PATCH = re.compile(r"patch(\d+)")


@dataclass(frozen=True)
class VitSize:
    """Size of a ViT, and which of DINOv2's and DINOv3's layers it has.

    Attributes:
        embed_dim: D.
        depth: blocks.
        num_heads: of attention.
        layer_scale: whether a factor per channel scales each residual branch.
        ffn: kind of MLP.
        registers: register tokens, where the position embedding has no slot for the class token.
        ffn_ratio: width of an MLP over D.
        ffn_multiple: of which the width of a SwiGLU is one.
        rope: rotary positions in place of learned ones.
        qkv_bias: whether queries, keys and values have a bias.
        mask_key_bias: whether the keys' part does not act.
    """

    embed_dim: int
    depth: int
    num_heads: int
    layer_scale: bool = False
    ffn: Literal["mlp", "swiglu"] = "mlp"
    registers: int = 0
    ffn_ratio: float = 4.0
    ffn_multiple: int = 8
    rope: bool = False
    qkv_bias: bool = True
    mask_key_bias: bool = False


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
    if match := _DINOV3.match(name):
        return _dinov3_size(match.group(1), biased=match.group(2) is not None)
    return None


def _dinov3_size(size: str, *, biased: bool) -> VitSize:
    gated = _DINOV3_SIZES.get(size)
    embed_dim, depth, num_heads = VIT_SIZES[size] if gated is None else gated[0]
    return VitSize(
        embed_dim,
        depth,
        num_heads,
        layer_scale=True,
        ffn="mlp" if gated is None else "swiglu",
        registers=4,
        ffn_ratio=4.0 if gated is None else gated[1],
        ffn_multiple=8 if gated is None else gated[2],
        rope=True,
        qkv_bias=biased,
        mask_key_bias=biased,
    )


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
    ffn_ratio: float = 4.0,
    ffn_multiple: int = 8,
    rope: bool = False,
    qkv_bias: bool = True,
    local_norm: bool = False,
) -> int:
    """Count the weights of a ViT with a CLS token and no classifier.

    Patch convolution C p^2 D + D, CLS token, registers and mask token D each, learned positions
    (1 + N) D, final norm 2 D each, and per block two norms 4 D, qkv 3 D^2 + 3 D, projection D^2 +
    D, MLP 2 H D + H + D or SwiGLU 3 H D + 2 H + D, layer scale 2 D.

    Args:
        img_size: side of a global crop in pixels, which sets N = (img_size / patch_size)^2.
        patch_size: p, in pixels.
        embed_dim: D.
        depth: number of blocks.
        in_chans: C, channels of an image.
        layer_scale: whether a factor per channel scales each residual branch.
        ffn: kind of MLP; H of SwiGLU is two thirds of an MLP's, rounded up to a multiple.
        registers: register tokens, which have no positions.
        class_position: whether the CLS token has one.
        mask_token: whether there is a mask token.
        ffn_ratio: H of an MLP over D.
        ffn_multiple: of which H of a SwiGLU is one.
        rope: rotary positions, which have no weights, in place of learned ones.
        qkv_bias: whether queries, keys and values have a bias.
        local_norm: whether local crops have a final norm of their own.

    Returns:
        Number of scalars.
    """
    positions = 0 if rope else (img_size // patch_size) ** 2 + class_position
    tokens = positions + 1 + registers + mask_token
    plain = int(ffn_ratio * embed_dim)
    gated = -(-int(plain * 2 / 3) // ffn_multiple) * ffn_multiple
    feed_forward = {
        "mlp": 2 * plain * embed_dim + plain + embed_dim,
        "swiglu": 3 * gated * embed_dim + 2 * gated + embed_dim,
    }
    norms_and_scales = (6 if layer_scale else 4) * embed_dim
    biases = (4 if qkv_bias else 1) * embed_dim
    block = 4 * embed_dim**2 + biases + feed_forward[ffn] + norms_and_scales
    embedding = (in_chans * patch_size**2 + 1) * embed_dim + tokens * embed_dim
    return embedding + depth * block + (4 if local_norm else 2) * embed_dim


def num_head_parameters(
    *,
    in_dim: int,
    num_prototypes: int,
    hidden_dim: int,
    bottleneck_dim: int,
    num_layers: int,
    batch_norm: bool,
    weight_norm: bool = True,
) -> int:
    """Count the weights of the DINO head, the K prototype lengths (`weight_g`) included.

    Args:
        in_dim: width D of the backbone's output.
        num_prototypes: K.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width before the prototypes.
        num_layers: linear layers of the MLP; 1 is a single layer in_dim -> bottleneck_dim.
        batch_norm: adds a scale and a shift per unit of each hidden layer.
        weight_norm: whether the prototypes have lengths.

    Returns:
        Number of scalars.
    """
    hidden = [hidden_dim] * (num_layers - 1)
    widths = [in_dim, *hidden, bottleneck_dim]
    mlp = sum(wide * out + out for wide, out in itertools.pairwise(widths))
    norms = 2 * sum(hidden) if batch_norm else 0
    return mlp + norms + num_prototypes * (bottleneck_dim + weight_norm)


class RopeConfig(Section):
    """Rotary positions, in DINOv3's form; the last three settings act in training only."""

    base: Positive | None = Field(
        default=100.0, description="Base of the periods; null: min_period and max_period."
    )
    min_period: Positive | None = Field(
        default=None,
        description="Shortest period; an axis of an image is 2 long. Needs base=null.",
    )
    max_period: Positive | None = Field(default=None, description="Longest period, likewise.")
    coordinates: Literal["separate", "min", "max"] = Field(
        default="separate",
        description="Each axis from -1 to 1 whatever the aspect (separate), or the shorter (min) "
        "or the longer one (max), with the same scale for the other.",
    )
    shift: PositiveOrZero = Field(
        default=0.0, description="Each axis is shifted by a number drawn from +- this."
    )
    jitter: float = Field(
        default=1.0,
        ge=1,
        description="Each axis is multiplied by a number drawn from 1 / this to this, uniform in "
        "its logarithm.",
    )
    rescale: float = Field(
        default=1.0,
        ge=1,
        description="Both axes are multiplied by one number, drawn likewise. 2.0 in DINOv3's 7B. "
        "All three are drawn for each block and for global and local crops, the same for all "
        "images of a step.",
    )

    @model_validator(mode="after")
    def _one_rule_for_periods(self) -> "RopeConfig":
        ends = self.min_period, self.max_period
        if (self.base is None) == (None in ends) or (
            self.base is not None and ends != (None, None)
        ):
            raise ValueError(
                "periods follow from base, or with base null from both min_period and max_period; "
                f"got {self.base}, {ends[0]} and {ends[1]}"
            )
        if self.min_period and self.max_period and self.min_period >= self.max_period:
            raise ValueError(
                f"need min_period below max_period={self.max_period}, got {self.min_period}"
            )
        return self

    @property
    def changes(self) -> bool:
        """Whether training changes coordinates."""
        return self.shift > 0 or self.jitter > 1 or self.rescale > 1


class ModelConfig(Section):
    """The backbone; a size left at null is the named model's own."""

    backbone: str = Field(
        default="vit_small_patch16_224",
        min_length=1,
        description="A timm ViT name, or 'resnet50'; of a frozen teacher whose features are "
        "learned also another ResNet or a ConvNeXt. Source: [C] vit_small, patch 16.",
    )
    patch_size: Count | None = Field(default=None, description="Side of a patch in pixels.")
    embed_dim: Count | None = Field(default=None, description="Width of a token.")
    depth: Count | None = Field(default=None, description="Number of transformer blocks.")
    num_heads: Count | None = Field(default=None, description="Attention heads per block.")
    layer_scale: Positive | None = Field(
        default=None,
        description="Initial factor of each residual branch, one trained number per channel; null: "
        "the named model's own, none in most. 1e-5 in DINOv2.",
    )
    ffn: Literal["mlp", "swiglu"] | None = Field(
        default=None,
        description="Feed-forward layer: mlp (GELU) or swiglu (two thirds as wide, as in DINOv2's "
        "largest models); null: the named model's own.",
    )
    ffn_ratio: Positive | None = Field(
        default=None,
        description="Width of an mlp over that of a token, from which that of a swiglu follows; "
        "null: the named model's own, 4 in most. 3 in DINOv3's 7B.",
    )
    ffn_multiple: Count | None = Field(
        default=None,
        description="The width of a swiglu is rounded up to a multiple of this; null: the named "
        "model's own, 8 in most. 64 in DINOv3's 7B.",
    )
    norm_eps: Positive | None = Field(
        default=None,
        description="Epsilon of the layer norms; null: the named model's own, 1e-6 in most. 1e-5 "
        "in DINOv3's 7B.",
    )
    local_norm: bool = Field(
        default=False,
        description="A final norm of their own for the class tokens of local crops, used in "
        "training only. Source: DINOv3 (arXiv:2508.10104).",
    )
    qkv_bias: bool | None = Field(
        default=None,
        description="Bias of queries, keys and values; null: the named model's own, true in most.",
    )
    mask_key_bias: bool | None = Field(
        default=None,
        description="Switch off the keys' part of that bias, as in DINOv3's models that have it; "
        "null: the named model's own, false in most.",
    )
    rope: RopeConfig | None = Field(
        default=None,
        description="Rotary positions in place of learned ones; null: the named model's own, "
        "learned ones in most. {}: as in DINOv3, without changes of coordinates.",
    )
    registers: CountOrZero | None = Field(
        default=None,
        description="Register tokens (arXiv:2309.16588), without positions; null: the named "
        "model's own, none in most.",
    )
    position_resize: Literal["by_factor", "by_size"] | None = Field(
        default=None,
        description="How position embeddings are resized to other grids. by_factor: bicubic with "
        "scale factor (n + 0.1) / stored. Source: [C]. by_size: bicubic to the size, antialiased, "
        "as DINOv2 with registers; null: by_size with registers, by_factor without.",
    )
    drop_path_rate: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Stochastic depth of the student: fraction dropped in the last block, rising "
        "linearly from 0 in the first. 0.0 for resnet50, which has none. Source: [C].",
    )
    drop_path_uniform: bool = Field(
        default=False,
        description="Drop the same fraction in all blocks, as DINOv2 does.",
    )
    drop_path_mode: Literal["per_image", "subset"] = Field(
        default="per_image",
        description="per_image: each image drops by itself. Source: [C]. subset: a fixed share of "
        "each micro-batch skips a block, which saves its compute. Source: DINOv2 "
        "(arXiv:2304.07193).",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_drop_path_in_resnet(cls, values: object) -> object:
        if not isinstance(values, Mapping) or named_convnet(str(values.get("backbone"))) is None:
            return values
        return {"drop_path_rate": 0.0, **values}

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        if self.convnet is not None:
            self._refuse_vit_sizes()
            return self
        if self.effective_patch_size is None and self.backbone.startswith(("resnet", "convnext")):
            raise ValueError(
                f"backbone: {self.backbone!r} is none of the ResNets and ConvNeXts that can be "
                f"built: {', '.join(CONVNETS)}"
            )
        if self.effective_patch_size is None:
            raise ValueError(
                f"backbone: no patch size in {self.backbone!r}; name a timm ViT such as "
                f"'vit_small_patch16_224', or '{RESNET50}', or set model.patch_size"
            )
        named = named_vit_size(self.backbone)
        dim = self.width
        heads = self.num_heads or (named.num_heads if named else None)
        if dim and heads and dim % heads:
            raise ValueError(
                f"embed_dim: {dim} cannot be divided by {heads} attention heads (model.num_heads)"
            )
        if self.rotates and dim and heads and dim // heads % 4:
            raise ValueError(
                f"rope: needs heads of a multiple of 4 channels, got {dim // heads} "
                "(model.embed_dim / model.num_heads)"
            )
        if self.rotates and self.position_resize is not None:
            raise ValueError(
                f"position_resize: {self.position_resize!r} is of learned positions, and rotary "
                "ones (model.rope) need no resizing; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> "ModelConfig":
        layers = self.layers
        if layers is not None and layers.mask_key_bias and not layers.qkv_bias:
            raise ValueError(
                "mask_key_bias: without a bias (model.qkv_bias=false) there is none to mask, "
                "need false, got true"
            )
        ffn = self.ffn if layers is None else layers.ffn
        if self.ffn_multiple is not None and ffn == "mlp":
            raise ValueError(
                f"ffn_multiple: {self.ffn_multiple} is of swiglu, and model.ffn is mlp; "
                "leave it out"
            )
        return self

    @property
    def convnet(self) -> ConvNetSize | None:
        """Its size if it is a convolutional network; None of a ViT."""
        return named_convnet(self.backbone)

    @property
    def rotates(self) -> bool:
        """Whether positions are rotary."""
        named = named_vit_size(self.backbone)
        return self.rope is not None or (named is not None and named.rope)

    @property
    def layers(self) -> VitSize | None:
        """Sizes and layers, those of the named model and the chosen ones; None if unknown."""
        named = named_vit_size(self.backbone)
        if named is None:
            return None
        chosen = {
            key: value
            for key in (
                *("embed_dim", "depth", "num_heads", "ffn", "ffn_ratio", "ffn_multiple"),
                *("registers", "qkv_bias", "mask_key_bias"),
            )
            if (value := getattr(self, key)) is not None
        }
        scales = named.layer_scale or self.layer_scale is not None
        return replace(named, **chosen, layer_scale=scales, rope=self.rotates)

    def _refuse_vit_sizes(self) -> None:
        sizes = ("patch_size", "embed_dim", "depth", "num_heads")
        ffn = ("ffn", "ffn_ratio", "ffn_multiple")
        attention = ("qkv_bias", "mask_key_bias", "rope", "position_resize")
        keys = (*sizes, "layer_scale", *ffn, "norm_eps", *attention, "registers", "local_norm")
        values = {key: getattr(self, key) for key in keys}
        given = [k for k, value in values.items() if value is not None and value is not False]
        if given:
            raise ValueError(f"{given[0]}: {self.backbone} has none, leave it out")
        if self.drop_path_rate:
            raise ValueError(
                f"drop_path_rate: {self.backbone} has no stochastic depth, "
                f"need 0.0, got {self.drop_path_rate}"
            )

    @property
    def width(self) -> int | None:
        """D, from `embed_dim` or the name; None where neither tells."""
        if self.convnet is not None:
            return self.convnet.widths[-1]
        named = named_vit_size(self.backbone)
        return self.embed_dim or (named.embed_dim if named else None)

    @property
    def effective_patch_size(self) -> int | None:
        """Patch side in pixels, from `patch_size` or the name; None of a convolutional network."""
        if self.convnet is not None:
            return None
        return self.patch_size or named_patch_size(self.backbone)
