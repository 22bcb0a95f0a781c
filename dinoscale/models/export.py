"""Backbones for export: one batch of images in, class token and patch tokens out.

The forward of `vit.VisionTransformer`, position embedding resize included, in tensor operations
that TorchScript and ONNX can export with dynamic batch, height and width. Parameters have the same
names and shapes.

Shape letters: N images, C channels, H, W pixels, P patches, R registers, D width, G side of the
stored grid of positions.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dinoscale.errors import ConfigError
from dinoscale.models.block import mask_key_bias
from dinoscale.models.vit import PositionResize, position_rule
from dinoscale.models.zoo import Layers, own_layers, timm_vit, torchvision_resnet50


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
        ConfigError: as `zoo.build_backbone` does; or the model has rotary positions.
    """
    if name == "resnet50":
        return PlainResNet50(torchvision_resnet50(in_chans=in_chans))
    chosen = Layers(**layers).over(own_layers(name))
    if chosen.rope is not None:
        raise ConfigError(
            f"model.rope: {name!r} has rotary positions, which the formats hf, torchscript and "
            "onnx do not get from us; use --to dino"
        )
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
