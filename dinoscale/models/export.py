"""Backbones for export: one batch of images in, class token and patch tokens out.

The forward of `vit.VisionTransformer`, with positions resized or computed for the size of image, in
tensor operations that TorchScript and ONNX can export with dynamic batch, height and width.
Parameters have the same names and shapes.

Shape letters: N images, C channels, H, W pixels, P patches, R registers, L tokens of an image, D
width, d channels of a head, G side of the stored grid of positions.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoscale.models.block import mask_key_bias
from dinoscale.models.rope import Rope
from dinoscale.models.vit import PositionResize, position_rule
from dinoscale.models.zoo import Layers, own_layers, timm_vit, torchvision_resnet


def build_plain(
    name: str,
    *,
    img_size: int,
    in_chans: int = 3,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    position_resize: PositionResize | None = None,
    mask_token: bool = False,
    local_norm: bool = False,
    **layers: Any,
) -> nn.Module:
    """Build a backbone that maps images (N, C, H, W) to cls (N, D) and patches (N, P, D).

    Args:
        name: as `zoo.build_backbone` takes it, like the other arguments.
        img_size: side in pixels of the images the position embedding is made for.
        in_chans: C.
        patch_size: in pixels; None for the model's own, like the next three.
        embed_dim: D.
        depth: number of blocks.
        num_heads: attention heads.
        position_resize: rule of `vit.resize_pos_embed`.
        mask_token: hold the mask token, which the forward does not use.
        local_norm: hold the norm of local crops, which the forward does not use.
        **layers: attributes of `zoo.Layers`.

    Raises:
        ConfigError: as `zoo.build_backbone` does.
    """
    if name == "resnet50":
        return PlainResNet50(torchvision_resnet(name, in_chans=in_chans))
    chosen = Layers(**layers).over(own_layers(name))
    source = timm_vit(
        name,
        img_size=img_size,
        in_chans=in_chans,
        layers=chosen,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
    )
    plain: PlainViT | RotaryViT
    if chosen.rope is not None:
        masked = bool(chosen.mask_key_bias)
        plain = RotaryViT(source, chosen.rope, mask_token=mask_token, key_bias_masked=masked)
    else:
        if chosen.mask_key_bias:
            mask_key_bias(source.blocks)
        plain = PlainViT(source, mask_token=mask_token, position_resize=position_resize)
    if local_norm:
        plain.local_norm = type(source.norm)(source.embed_dim, eps=source.norm.eps)
    return plain


class PatchEmbed(nn.Module):
    """Holds the projection, so that its name is `patch_embed.proj`."""

    def __init__(self, proj: nn.Conv2d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, images: Tensor) -> Tensor:
        """Project images (N, C, H, W) to (N, D, rows, columns)."""
        projected: Tensor = self.proj(images)
        return projected


class PlainViT(nn.Module):
    """A ViT that resizes its position embedding as `vit.resize_pos_embed` does."""

    def __init__(
        self,
        source: Any,
        *,
        mask_token: bool = False,
        position_resize: PositionResize | None = None,
    ) -> None:
        """Adopt the layers of `source`, a timm ViT accepted by `zoo.timm_vit`."""
        super().__init__()
        self.cls_token = source.cls_token
        self.reg_token = source.reg_token
        self.pos_embed = source.pos_embed
        self.mask_token = nn.Parameter(torch.zeros(1, source.embed_dim)) if mask_token else None
        self.patch_embed = PatchEmbed(source.patch_embed.proj)
        self.norm_pre = source.norm_pre
        self.blocks = source.blocks
        self.norm = source.norm
        self.num_prefix: int = 1 + (0 if self.reg_token is None else self.reg_token.shape[1])
        self.prefix_slots: int = self.pos_embed.shape[1] - source.patch_embed.num_patches
        rule = position_rule(position_resize, registers=self.num_prefix > 1)
        self.by_size: bool = rule == "by_size"
        self.side: int = math.isqrt(self.pos_embed.shape[1] - self.prefix_slots)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (N, C, H, W) to the normalised cls (N, D) and patches (N, P, D)."""
        projected = self.patch_embed(images)  # (N, D, rows, columns)
        x = projected.flatten(2).transpose(1, 2) + self.positions(projected, images)
        prefix = self.cls_token
        if self.prefix_slots == 1:
            prefix = prefix + self.pos_embed[:, :1]
        if self.reg_token is not None:
            prefix = torch.cat((prefix, self.reg_token), dim=1)  # (1, 1+R, D)
        if self.prefix_slots > 1:
            prefix = prefix + self.pos_embed[:, : self.prefix_slots]
        x = self.norm_pre(torch.cat((prefix.expand(x.shape[0], -1, -1), x), dim=1))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, self.num_prefix :]

    def positions(self, projected: Tensor, images: Tensor) -> Tensor:
        """Position embedding (1, P, D) of the patches of images."""
        grid = self.pos_embed[:, self.prefix_slots :].unflatten(1, (self.side, self.side))
        rows, columns = projected.shape[2], projected.shape[3]
        if self.by_size:
            down = antialiased_matrix(rows, self.side, grid)
            along = antialiased_matrix(columns, self.side, grid)
        else:
            # Tensors, not numbers: an exported graph then decides again for every image size.
            device = self.pos_embed.device
            height = torch.full((), images.shape[2], device=device)
            width = torch.full((), images.shape[3], device=device)
            resized = (height != width) | (torch.full((), rows, device=device) != self.side)
            excess = 0.1 * resized.to(grid.dtype)  # 0 at the stored size: both are identities
            down = cubic_matrix(rows, self.side, excess)
            along = cubic_matrix(columns, self.side, excess)
        return torch.einsum("rs,nstd,ct->nrcd", down, grid, along).flatten(1, 2)


def cubic_matrix(count: int, side: int, excess: Tensor) -> Tensor:
    """Bicubic resize of G points to `count`, at the scale factor (count + excess) / G.

    Args:
        count: points of the result.
        side: G.
        excess: scalar that is added to `count` in the scale factor.

    Returns:
        (count, G), dtype of `excess`; rows sum to 1. Beyond the ends the last point is repeated.
    """
    a = -0.75  # the coefficient of torch's bicubic resize
    steps = torch.arange(count, dtype=excess.dtype, device=excess.device)
    at = (steps + 0.5) * (side / (count + excess)) - 0.5  # positions of the results among the G
    first = torch.floor(at)
    points = torch.arange(side, dtype=excess.dtype, device=excess.device)
    matrix = torch.zeros_like(at[:, None] * points)
    for tap in (-1, 0, 1, 2):
        d = torch.abs(at - first - tap)
        near = ((a + 2) * d - (a + 3)) * d * d + 1  # d <= 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a  # 1 < d <= 2
        weights = torch.where(d <= 1, near, far)
        point = torch.clamp(first + tap, 0, side - 1)
        matrix = matrix + weights[:, None] * (point[:, None] == points).to(excess.dtype)
    return matrix


def antialiased_matrix(count: int, side: int, like: Tensor) -> Tensor:
    """Antialiased bicubic resize of G points to `count`: the identity for as many.

    Args:
        count: points of the result.
        side: G.
        like: tensor of the dtype and device of the result.

    Returns:
        (count, G); rows sum to 1. Beyond the ends there are no points.
    """
    a = -0.5  # the coefficient of torch's antialiased bicubic resize
    steps = torch.arange(count, dtype=like.dtype, device=like.device)
    points = torch.arange(side, dtype=like.dtype, device=like.device)
    scale = side / (count + torch.zeros((), dtype=like.dtype, device=like.device))
    at = (steps + 0.5) * scale - 0.5  # positions of the results among the G
    d = torch.abs(points - at[:, None]) / torch.clamp(scale, min=1)  # wider to shrink
    near = ((a + 2) * d - (a + 3)) * d * d + 1  # d <= 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a  # 1 < d <= 2
    weights = torch.where(d <= 1, near, torch.where(d <= 2, far, torch.zeros_like(d)))
    return weights / weights.sum(dim=1, keepdim=True)


class RotaryViT(nn.Module):
    """A ViT whose queries and keys turn with the positions of patches, as `rope.rotation` has it.

    Attributes:
        embed_dim: D.
        rope: by which rule.
        num_prefix: class token and registers, which do not turn.
        periods: (d/4,), of float32 precision.
    """

    periods: list[float]

    def __init__(
        self,
        source: Any,
        rope: Rope,
        *,
        mask_token: bool = False,
        key_bias_masked: bool = False,
    ) -> None:
        """Adopt the layers of `source`, a timm ViT without positions from `zoo.timm_vit`."""
        super().__init__()
        self.embed_dim: int = source.embed_dim
        self.cls_token = source.cls_token
        self.reg_token = source.reg_token
        self.mask_token = nn.Parameter(torch.zeros(1, source.embed_dim)) if mask_token else None
        self.patch_embed = PatchEmbed(source.patch_embed.proj)
        self.norm_pre = source.norm_pre
        self.blocks = nn.ModuleList(
            RotaryBlock(block, key_bias_masked=key_bias_masked) for block in source.blocks
        )
        self.norm = source.norm
        self.num_prefix: int = 1 + (0 if self.reg_token is None else self.reg_token.shape[1])
        self.rope = rope
        self.coordinates: str = rope.coordinates
        head_dim, cpu = source.blocks[0].attn.head_dim, torch.device("cpu")
        # Numbers, not a buffer, which would be one of the model's tensors.
        self.periods = rope.periods(head_dim, dtype=torch.float32, device=cpu).tolist()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (N, C, H, W) to the normalised cls (N, D) and patches (N, P, D)."""
        projected = self.patch_embed(images)  # (N, D, rows, columns)
        prefix = self.cls_token
        if self.reg_token is not None:
            prefix = torch.cat((prefix, self.reg_token), dim=1)  # (1, 1+R, D)
        x = projected.flatten(2).transpose(1, 2)
        x = self.norm_pre(torch.cat((prefix.expand(x.shape[0], -1, -1), x), dim=1))
        cos, sin = self.tables(projected)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x)
        return x[:, 0], x[:, self.num_prefix :]

    def tables(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (L, d) of a grid of patches, those of a pair's first half negative."""
        rows, columns = projected.shape[2], projected.shape[3]
        # Tensors, not numbers: an exported graph then compares them again for every image size.
        height = torch.full((), rows, dtype=projected.dtype, device=projected.device)
        width = torch.full((), columns, dtype=projected.dtype, device=projected.device)
        if self.coordinates == "max":
            height = width = torch.maximum(height, width)
        elif self.coordinates == "min":
            height = width = torch.minimum(height, width)
        down = self.angles(rows, height)[:, None].expand(-1, columns, -1)
        along = self.angles(columns, width)[None].expand(rows, -1, -1)
        angles = torch.cat((down, along), dim=2).flatten(0, 1)  # (P, d/2)
        sin, cos = angles.sin(), angles.cos()
        before = (0, 0, self.num_prefix, 0)
        cosines = F.pad(torch.cat((cos, cos), dim=1), before, value=1.0)
        return cosines, F.pad(torch.cat((-sin, sin), dim=1), before)

    def angles(self, count: int, span: Tensor) -> Tensor:
        """Angles (count, d/4) of the patches along an axis, whose centres run to 1 over `span`."""
        steps = torch.arange(count, dtype=span.dtype, device=span.device)
        centres = 2 * (steps + 0.5) / span - 1
        periods = torch.tensor(self.periods, dtype=span.dtype, device=span.device)
        return 2 * math.pi * centres[:, None] / periods


class RotaryBlock(nn.Module):
    """Pre-norm transformer block with rotary positions; adopts the layers of a timm block."""

    def __init__(self, source: Any, *, key_bias_masked: bool) -> None:
        super().__init__()
        self.norm1 = source.norm1
        self.attn = RotaryAttention(source.attn, key_bias_masked=key_bias_masked)
        self.ls1 = source.ls1
        self.norm2 = source.norm2
        self.mlp = source.mlp
        self.ls2 = source.ls2

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map tokens (N, L, D) to tokens, with tables (L, d)."""
        x = x + self.ls1(self.attn(self.norm1(x), cos, sin))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


class RotaryAttention(nn.Module):
    """Multi-head self-attention whose queries and keys turn."""

    def __init__(self, source: Any, *, key_bias_masked: bool) -> None:
        super().__init__()
        self.num_heads: int = source.num_heads
        self.head_dim: int = source.head_dim
        self.key_bias_masked = key_bias_masked
        self.qkv = source.qkv
        self.q_norm = source.q_norm
        self.k_norm = source.k_norm
        self.norm = getattr(source, "norm", nn.Identity())  # older timm has none
        self.proj = source.proj

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map tokens (N, L, D) to (N, L, D), with tables (L, d)."""
        qkv = F.linear(x, self.qkv.weight, self.bias())
        heads = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        q, k = self.turned(self.q_norm(q), cos, sin), self.turned(self.k_norm(k), cos, sin)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        attended: Tensor = self.proj(self.norm(x))
        return attended

    def bias(self) -> Tensor | None:
        """That of queries, keys and values (3 D,), zero where it does not act."""
        bias: Tensor | None = self.qkv.bias
        if bias is not None and self.key_bias_masked:
            of_queries, of_keys, of_values = bias.chunk(3)
            bias = torch.cat((of_queries, torch.zeros_like(of_keys), of_values))
        return bias

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn queries or keys (N, heads, L, d)."""
        return x * cos + x.roll((self.head_dim // 2,), (-1,)) * sin


class PlainResNet50(nn.Module):
    """ResNet-50 without classifier; its "class token" is the average of the patches."""

    def __init__(self, source: Any) -> None:
        """Adopt the layers of a torchvision `resnet50`."""
        super().__init__()
        self.conv1 = source.conv1
        self.bn1 = source.bn1
        self.relu = source.relu
        self.maxpool = source.maxpool
        self.layer1 = source.layer1
        self.layer2 = source.layer2
        self.layer3 = source.layer3
        self.layer4 = source.layer4
        self.avgpool = source.avgpool

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (N, C, H, W) to pooled features (N, 2048) and the last map (N, P, 2048)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1), x.flatten(2).transpose(1, 2)
