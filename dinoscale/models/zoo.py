"""Backbones by name: every timm ViT our forward reproduces, ResNets and ConvNeXts.

The only module that imports timm, and only when a backbone is built.
"""

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dinoscale.errors import ConfigError
from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.convnet import ConvNet
from dinoscale.models.rope import Rope
from dinoscale.models.vit import PositionResize, VisionTransformer

FeedForward = Literal["mlp", "swiglu"]

_FAMILIES = ("vision_transformer", "deit")  # timm modules that define plain ViTs
_SWIGLU = re.compile(r"vit_giant_patch14_(?:reg4_)?dinov2(?:\..*)?")
# Sizes of the paper that timm has only with patches of 16 pixels.
_OTHER_PATCH_SIZE = re.compile(r"(vit_(?:tiny|small|base|large))_patch(\d+)_224")
# timm has DINOv3's models in a family of its own (Eva), with other names of the same layers.
_DINOV3 = re.compile(
    r"vit_(small|small_plus|base|large|huge_plus|7b)_patch16_dinov3(_qkvb)?(?:\..*)?"
)
_DINOV3_SIZES: dict[str, dict[str, int]] = {
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "small_plus": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge_plus": {"embed_dim": 1280, "depth": 32, "num_heads": 20},
    "7b": {"embed_dim": 4096, "depth": 40, "num_heads": 32},
}
_CONVNET = re.compile(
    r"(resnet(?:18|34|50|101|152)|convnext_(?:atto|femto|pico|nano|tiny|small|base|large|xlarge))"
    r"(?:\..*)?"  # a tag of weights
)
_MLP_RATIO, _SWIGLU_MULTIPLE = 4.0, 8  # of all models of which nothing else is known


@dataclass(frozen=True)
class Layers:
    """The layers of a ViT beside its sizes; None for the named model's own.

    Attributes:
        norm_eps: epsilon of the layer norms; 1e-6 in most.
        layer_scale: initial factor of each residual branch; most have no such factors.
        ffn: plain MLP or SwiGLU.
        ffn_ratio: width of an MLP over that of a token, from which a SwiGLU's follows
            (`swiglu_width`).
        ffn_multiple: the width of a SwiGLU is rounded up to a multiple of it.
        registers: R register tokens without positions; the class token has one, as in the authors'
            code. Those of timm's `reg4` models include the class token's position in the token, so
            `cls_token` there is our `cls_token + pos_embed[:, :1]`, and `pos_embed` our
            `pos_embed[:, 1:]`.
        rope: rotary positions in place of learned ones; None also for learned ones.
        qkv_bias: whether queries, keys and values have a bias.
        mask_key_bias: whether the keys' part of it does not act.
    """

    norm_eps: float | None = None
    layer_scale: float | None = None
    ffn: FeedForward | None = None
    ffn_ratio: float | None = None
    ffn_multiple: int | None = None
    registers: int | None = None
    rope: Rope | None = None
    qkv_bias: bool | None = None
    mask_key_bias: bool | None = None

    def over(self, own: "Layers") -> "Layers":
        """These, and those of `own` where there are none."""
        chosen = {key: value for key, value in vars(self).items() if value is not None}
        return Layers(**{**vars(own), **chosen})


def own_layers(name: str) -> Layers:
    """What the layers of a named model are where timm's plain ViT of its size has others."""
    if match := _DINOV3.fullmatch(name):
        size, biased = match[1], match[2] is not None
        return Layers(
            norm_eps=1e-5,
            layer_scale=1e-5,
            ffn="swiglu" if size in ("small_plus", "huge_plus", "7b") else "mlp",
            ffn_ratio={"small_plus": 6.0, "huge_plus": 6.0, "7b": 3.0}.get(size),
            ffn_multiple=64 if size == "7b" else None,
            registers=4,
            rope=Rope(),
            qkv_bias=biased,
            mask_key_bias=biased,
        )
    return Layers(ffn="swiglu" if _SWIGLU.fullmatch(name) else None)


def build_backbone(
    name: str,
    *,
    img_size: int,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    in_chans: int = 3,
    position_resize: PositionResize | None = None,
    mask_token: bool = False,
    local_norm: bool = False,
    **layers: Any,
) -> VisionTransformer | ConvNet:
    """Build a backbone with fresh weights.

    ViT weights start as in the authors' code: `init_weights`.

    Args:
        name: a timm ViT, `vit_{tiny,small,base,large}_patch{8,16}_224`, `vit_*_patch16_dinov3`,
            `resnet{18,34,50,101,152}` or `convnext_{atto,...,xlarge}`.
        img_size: side in pixels of the images the position embedding is made for.
        patch_size: patch side in pixels; None for the model's own.
        embed_dim: width; None for the model's own.
        depth: number of blocks; None for the model's own.
        num_heads: attention heads; None for the model's own.
        in_chans: channels of an image.
        position_resize: rule of `vit.resize_pos_embed`; None for by_size with registers and
            by_factor without.
        mask_token: whether patches can be masked.
        local_norm: whether class tokens of local crops have a final norm of their own.
        **layers: attributes of `Layers`.

    Raises:
        ConfigError: the name is unknown, our forward cannot reproduce the model, or the sizes do
            not fit together.
    """
    sizes = {
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
    }
    ensure_torchvision()
    if match := _CONVNET.fullmatch(name):
        of_vits: dict[str, object] = {"position_resize": position_resize, **sizes, **layers}
        of_vits |= {"mask_token": mask_token or None, "norm_eps": None, "local_norm": local_norm}
        _require_none(of_vits, name=match[1])
        return _convnet(match[1], in_chans=in_chans)
    chosen = Layers(**layers).over(own_layers(name))
    source = timm_vit(name, img_size=img_size, in_chans=in_chans, layers=chosen, **sizes)
    model = VisionTransformer(
        source,
        mask_token=mask_token,
        position_resize=position_resize,
        rope=chosen.rope,
        key_bias_masked=bool(chosen.mask_key_bias),
        local_norm=local_norm,
    )
    init_weights(model)
    return model


def _require_none(only_vits: Mapping[str, object], *, name: str) -> None:
    """Refuse the arguments of a ViT that a convolutional network is given."""
    given = [key for key, value in only_vits.items() if value is not None and value is not False]
    if given:
        raise ConfigError(f"model.{given[0]}: {name} has none")


def timm_vit(
    name: str,
    *,
    img_size: int,
    in_chans: int,
    layers: Layers,
    **sizes: int | None,
) -> Any:
    """Build timm's own model for a name that `build_backbone` takes; arguments as there.

    With `registers`, its position embedding has a slot for the class token, which timm's forward
    does not expect. With `rope` it has none, and timm's forward has no positions.

    Args:
        name: as there.
        img_size: as there.
        in_chans: as there.
        layers: the model's own ones among them.
        **sizes: as there.

    Raises:
        ConfigError: the name is unknown, our forward cannot reproduce the model, or the sizes do
            not fit together.
    """
    ensure_torchvision()
    import timm

    changed = {key: value for key, value in sizes.items() if value is not None}
    timm_name, changed = timm_arguments(name, **changed)
    family = timm.model_entrypoint(timm_name.split(".")[0]).__module__.split(".")[-1]
    if family not in _FAMILIES:
        raise ConfigError(
            f"model.backbone: cannot train {name!r}: it is of timm's family {family!r}, "
            f"not a plain ViT ({', '.join(_FAMILIES)})"
        )
    try:
        source = timm.create_model(
            timm_name,
            pretrained=False,
            num_classes=0,
            global_pool="token",
            img_size=img_size,
            in_chans=in_chans,
            weight_init="skip",  # init_weights follows
            **changed,
            **_layer_arguments(layers),
        )
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model.backbone: timm cannot build {name!r} as a ViT with a class token: {reason}"
        ) from error
    _require_ours(source, name=name, rope=layers.rope)
    _adapt(source, layers, name=name, img_size=img_size)
    return source


def own_num_heads(name: str) -> int:
    """Attention heads of a ViT that `build_backbone` builds by this name.

    Raises:
        ConfigError: it builds none.
    """
    sizes = {"patch_size": 16, "depth": 1}  # which any of them may have
    with torch.device("meta"):
        source = timm_vit(name, img_size=16, in_chans=3, layers=own_layers(name), **sizes)
    return int(source.blocks[0].attn.num_heads)


def _adapt(source: Any, layers: Layers, *, name: str, img_size: int) -> None:
    """Give timm's model what its arguments cannot; refuse sizes that do not fit together."""
    patch_size = source.patch_embed.proj.kernel_size[0]
    if img_size % patch_size:
        raise ConfigError(
            f"crops.global_size: {img_size} is not a multiple of the patch size {patch_size}"
        )
    if layers.registers and source.pos_embed is not None:
        _give_class_position(source)
    if layers.norm_eps is not None:
        for module in source.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = layers.norm_eps
    if layers.rope is not None and source.blocks[0].attn.head_dim % 4:
        raise ConfigError(
            f"model.rope: needs heads of a multiple of 4 channels, and {name!r} has "
            f"{source.blocks[0].attn.head_dim} (model.embed_dim / model.num_heads)"
        )


def _layer_arguments(layers: Layers) -> dict[str, Any]:
    """Arguments of timm for these layers; none for what is the named model's own."""
    from timm.layers import Mlp

    arguments: dict[str, Any] = {}
    ratio = _MLP_RATIO if layers.ffn_ratio is None else layers.ffn_ratio
    if layers.layer_scale is not None:
        arguments["init_values"] = layers.layer_scale
    if layers.ffn == "swiglu":
        multiple = layers.ffn_multiple or _SWIGLU_MULTIPLE
        arguments["mlp_layer"] = functools.partial(_swiglu, ratio=ratio, multiple=multiple)
    elif layers.ffn == "mlp":
        arguments |= {"mlp_layer": Mlp, "act_layer": nn.GELU, "mlp_ratio": ratio}
    elif layers.ffn_ratio is not None:
        arguments["mlp_ratio"] = ratio
    if layers.registers is not None:
        arguments |= {"reg_tokens": layers.registers, "no_embed_class": layers.registers > 0}
    if layers.rope is not None:
        arguments["pos_embed"] = "none"
    if layers.qkv_bias is not None:
        arguments["qkv_bias"] = layers.qkv_bias
    return arguments


def _swiglu(in_features: int, *, ratio: float, multiple: int, **options: Any) -> Any:
    """A SwiGLU of `swiglu_width`, whatever hidden width and activation a block asks for."""
    from timm.layers import SwiGLUPacked

    width = 2 * swiglu_width(in_features, ratio=ratio, multiple=multiple)  # of both factors
    return SwiGLUPacked(in_features, **{**options, "hidden_features": width, "act_layer": nn.SiLU})


def swiglu_width(
    embed_dim: int, *, ratio: float = _MLP_RATIO, multiple: int = _SWIGLU_MULTIPLE
) -> int:
    """Hidden width of a SwiGLU: two thirds of an MLP's, rounded up to a multiple.

    Its three matrices then have about as many weights as the MLP's two. Source: code of Oquab et
    al. 2023 (arXiv:2304.07193), with 8, and of Simeoni et al. 2025 (arXiv:2508.10104), with 64.

    Args:
        embed_dim: D.
        ratio: width of the MLP over D.
        multiple: the width is divisible by it.
    """
    return -(-int(int(ratio * embed_dim) * 2 / 3) // multiple) * multiple


def _give_class_position(source: Any) -> None:
    """Add a slot for the class token to a position embedding of patches alone."""
    _, num_patches, width = source.pos_embed.shape
    source.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, width))  # init_weights follows


def timm_arguments(name: str, **changed: int) -> tuple[str, dict[str, int]]:
    """Name of a model in timm, and the sizes to give it.

    Raises:
        ConfigError: the name is unknown.
    """
    import timm

    if match := _DINOV3.fullmatch(name):
        return "vit_small_patch16_224", {**_DINOV3_SIZES[match[1]], **changed}
    if timm.is_model(name):
        return name, changed
    match = _OTHER_PATCH_SIZE.fullmatch(name)
    if match:
        return f"{match[1]}_patch16_224", {"patch_size": int(match[2]), **changed}
    known = ["resnet50", *timm.list_models(module="vision_transformer")]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    raise ConfigError(
        f"model.backbone: unknown model {name!r}, did you mean "
        f"{' or '.join(map(repr, near or ['vit_small_patch16_224']))}?"
    )


def adopt(source: Any, *, name: str) -> VisionTransformer:
    """Give the layers of a timm ViT our forward; weights are kept.

    Args:
        source: a `timm.models.vision_transformer.VisionTransformer`; its layers move into the
            result, so do not use it afterwards.
        name: of the model, for error messages.

    Raises:
        ConfigError: the model does something that our forward does not.
    """
    _require_ours(source, name=name)
    return VisionTransformer(source)


def _require_ours(source: Any, *, name: str, rope: Rope | None = None) -> None:
    """Raise ConfigError if our forward would differ from that of a timm model but for `rope`."""
    reason = _why_not(source)
    if rope is None and source.pos_embed is None:
        reason = "it has no learned position embedding"
    if reason:
        raise ConfigError(f"model.backbone: cannot train {name!r}: {reason}")


def _why_not(source: Any) -> str | None:
    """The first reason why our forward would differ from the model's own, or None."""
    from timm.layers import GluMlp, Mlp, PatchEmbed, SwiGLU
    from timm.models import vision_transformer

    if type(source) is not vision_transformer.VisionTransformer:
        return f"it is a {type(source).__name__}, not timm's plain VisionTransformer"
    embed = source.patch_embed
    patch = tuple(getattr(embed.proj, "kernel_size", ()))
    checks = (
        (source.cls_token is None, "it has no class token"),
        (not isinstance(embed, PatchEmbed), f"its patch embedding is a {type(embed).__name__}"),
        (not isinstance(embed.proj, nn.Conv2d), "its patch projection is not a convolution"),
        (not isinstance(embed.norm, nn.Identity), "it normalises patch embeddings"),
        (len(set(patch)) != 1, f"its patches are not square: {patch}"),
        (isinstance(source.norm, nn.Identity), "it has no norm on its output tokens"),
        (not isinstance(source.fc_norm, nn.Identity), "it normalises after pooling"),
        (source.attn_pool is not None, "it pools by attention"),
        (not isinstance(source.patch_drop, nn.Identity), "it drops patches"),
        (any(m.p > 0 for m in source.modules() if isinstance(m, nn.Dropout)), "it has dropout"),
    )
    for fails, reason in checks:
        if fails:
            return reason
    for block in source.blocks:
        if type(block) is not vision_transformer.Block:
            return f"its blocks are {type(block).__name__}, not pre-norm Block"
        if (
            type(block.attn) is not vision_transformer.Attention
            or getattr(block.attn, "gate", None) is not None
        ):
            return "its attention is not plain multi-head attention"
        if not isinstance(block.mlp, (Mlp, GluMlp, SwiGLU)):
            return f"its MLP is a {type(block.mlp).__name__}"
        if type(block.drop_path1) is not nn.Identity:
            return "it was built with stochastic depth, which is ours to do"
    return None


def init_weights(model: VisionTransformer) -> None:
    """Draw initial weights as the authors' code does; layer norms and scales keep their own.

    Linear layers, tokens and positions are normal with std 0.02 and biases zero. The authors
    truncate at -2 and 2, a hundred standard deviations away. The patch projection has the default
    of `nn.Conv2d`. A model with learned positions and layer scale starts as DINOv2's: class token
    and registers with std 1e-6.
    """
    has_layer_scale = not isinstance(model.blocks[0].get_submodule("ls1"), nn.Identity)
    std_of_tokens = 1e-6 if has_layer_scale and model.rope is None else 0.02
    if model.pos_embed is not None:
        nn.init.normal_(model.pos_embed, std=0.02)
    for token in (model.cls_token, model.reg_token):
        if token is not None:
            nn.init.normal_(token, std=std_of_tokens)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    model.patch_embed.proj.reset_parameters()


def _convnet(name: str, *, in_chans: int) -> ConvNet:
    """Build one with fresh weights, as the library has them."""
    if name.startswith("resnet"):
        source = torchvision_resnet(name, in_chans=in_chans)
        layers = [each for each in source.named_children() if each[0] not in ("avgpool", "fc")]
        return ConvNet(name, layers, embed_dim=source.fc.in_features)
    import timm

    source = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans)
    layers = [("stem", source.stem), ("stages", source.stages)]
    return ConvNet(name, layers, embed_dim=source.num_features, norm=source.head.norm)


def torchvision_resnet(name: str, *, in_chans: int) -> Any:
    """Build torchvision's own ResNet with fresh weights, for images of any channels."""
    ensure_torchvision()
    import torchvision

    source = getattr(torchvision.models, name)(weights=None)
    if in_chans != 3:  # as torchvision builds and initializes it
        source.conv1 = nn.Conv2d(in_chans, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(source.conv1.weight, mode="fan_out", nonlinearity="relu")
    return source
