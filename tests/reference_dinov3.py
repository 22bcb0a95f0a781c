"""The training step of DINOv3 as far as it differs from DINOv2's, written literally.

Slow on purpose, like `tests.reference_dinov2`, whose step it takes: rotary positions by their
definition, one forward per resolution, all ranks in one process. Source: Simeoni et al. 2025
(arXiv:2508.10104) and what the authors' code does; parameters have its names.
`tests/golden23/test_reference.py` compares it with recorded runs of that code.
Differs: rotations in the type of the network, where the authors' training has bfloat16; no Gram
anchoring. Under autocast to bfloat16 both have that.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoscale.config import RunConfig
from dinoscale.config.sections.backbones import named_vit_size
from dinoscale.config.sections.heads import HeadConfig
from tests.reference import PatchEmbed
from tests.reference_dinov2 import (
    LayerScale,
    ReferenceStep,
    Share,
    dino_loss,
    ibot_loss,
    koleo_loss,
)

_NAMES = (  # in our networks, in the reference's
    ("patch_head.", "ibot_head."),
    ("head.", "dino_head."),
    ("backbone.reg_token", "backbone.storage_tokens"),
    ("backbone.local_norm.", "backbone.local_cls_norm."),
)


def weights_of(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """The state dict of one of our networks with the reference's names."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for ours, theirs in _NAMES:
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        if config.model.ffn == "swiglu" and ".mlp.fc1." in name:
            both = value.chunk(2)
            renamed |= {name.replace("fc1", f"w{i}"): half for i, half in enumerate(both, start=1)}
            continue
        if config.model.ffn == "swiglu":
            name = name.replace(".mlp.fc2.", ".mlp.w3.")
        renamed[name] = value
    return renamed


def _sizes(config: RunConfig) -> tuple[int, int, int]:
    """Width, depth and heads."""
    model = config.model
    named = named_vit_size(model.backbone)
    assert named is not None  # else `ReferenceStep` refuses it
    return (
        model.embed_dim or named.embed_dim,
        model.depth or named.depth,
        model.num_heads or named.num_heads,
    )


def rotated(x: Tensor, grid: tuple[int, int], *, base: float) -> Tensor:
    """Queries or keys (N, heads, L, d), whose last tokens are the patches of a grid, turned."""
    rows, columns = grid
    quarter = x.shape[-1] // 4
    like = {"dtype": x.dtype, "device": x.device}
    periods = base ** (torch.arange(quarter, **like) / (2 * quarter) * 2)
    i, j = torch.meshgrid(
        (torch.arange(rows, **like) + 0.5) / rows * 2 - 1,
        (torch.arange(columns, **like) + 0.5) / columns * 2 - 1,
        indexing="ij",
    )
    places = torch.stack((i, j), dim=-1).flatten(0, 1)  # (P, 2)
    angles = 2 * math.pi * places[:, :, None] / periods  # (P, 2, d / 4)
    angles = angles.flatten(1).tile(2)  # (P, d)
    special, patches = x.split([x.shape[2] - rows * columns, rows * columns], dim=2)
    first, second = patches.chunk(2, dim=-1)
    turned = patches * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
    return torch.cat((special, turned), dim=2)


class Attention(nn.Module):
    """Attention with rotary positions, the keys' bias masked or not."""

    def __init__(self, dim: int, config: RunConfig) -> None:
        super().__init__()
        model = config.model
        assert model.rope is not None
        assert model.rope.base is not None
        _, _, self.num_heads = _sizes(config)
        self.base = model.rope.base
        self.masked = bool(model.mask_key_bias)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        n, length, dim = x.shape
        bias = self.qkv.bias
        if self.masked:
            keys = torch.arange(dim, 2 * dim, device=x.device)
            bias = bias * torch.ones_like(bias).index_fill(0, keys, 0)
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotated(q, grid, base=self.base), rotated(k, grid, base=self.base)
        weights = (q @ k.transpose(-2, -1) * (dim // self.num_heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, length, dim))


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """w3 (silu(w1 x) * (w2 x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """x + scaled attention, then x + scaled MLP."""

    def __init__(self, dim: int, config: RunConfig) -> None:
        super().__init__()
        model = config.model
        initial, eps = model.layer_scale or 1.0, model.norm_eps or 1e-6
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, config)
        self.ls1 = LayerScale(dim, initial)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        hidden = int(dim * (model.ffn_ratio or 4))
        self.mlp: nn.Module = Mlp(dim, hidden)
        if model.ffn == "swiglu":
            multiple = model.ffn_multiple or 8
            self.mlp = SwiGlu(dim, math.ceil(int(hidden * 2 / 3) / multiple) * multiple)
        self.ls2 = LayerScale(dim, initial)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), grid))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ReferenceViT3(nn.Module):
    """Images of one size, some patches masked, to their normalised tokens."""

    def __init__(self, config: RunConfig, *, drop_path_rate: float) -> None:
        super().__init__()
        assert drop_path_rate == 0
        model = config.model
        (dim, depth, _), eps = _sizes(config), model.norm_eps or 1e-6
        self.patch_size = model.effective_patch_size or 0
        self.patch_embed = PatchEmbed(config.data.channels, dim, self.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.storage_tokens = (
            nn.Parameter(torch.zeros(1, model.registers, dim)) if model.registers else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList(Block(dim, config) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.local_cls_norm = nn.LayerNorm(dim, eps=eps) if model.local_norm else None

    def forward(
        self, images: Tensor, masks: Tensor | None = None, *, local: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Class tokens (N, D) and patches (N, P, D); `masks` (N, P) bool."""
        x = self.patch_embed(images)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        special = [self.cls_token]
        if self.storage_tokens is not None:
            special.append(self.storage_tokens)
        num_special = sum(tokens.shape[1] for tokens in special)
        x = torch.cat((*(tokens.expand(len(x), -1, -1) for tokens in special), x), dim=1)
        grid = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        for block in self.blocks:
            x = block(x, grid)
        of_class = self.local_cls_norm if local and self.local_cls_norm is not None else self.norm
        return of_class(x[:, 0]), self.norm(x[:, num_special:])


class PlainHead(nn.Module):
    """MLP, unit sphere, a linear layer without bias."""

    def __init__(self, in_dim: int, head: HeadConfig) -> None:
        super().__init__()
        widths = [in_dim, *[head.hidden_dim] * (head.num_layers - 1), head.bottleneck_dim]
        layers: list[nn.Module] = []
        for i in range(head.num_layers):
            layers += [nn.Linear(widths[i], widths[i + 1]), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = nn.Linear(head.bottleneck_dim, head.num_prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2, eps=1e-12))


class ReferenceNetwork3(nn.Module):
    """Backbone and both heads."""

    def __init__(self, config: RunConfig, *, drop_path_rate: float) -> None:
        super().__init__()
        assert config.patch_head is not None
        self.backbone = ReferenceViT3(config, drop_path_rate=drop_path_rate)
        dim = self.backbone.cls_token.shape[-1]
        self.dino_head = PlainHead(dim, config.head)
        self.ibot_head = PlainHead(dim, config.patch_head)

    def logits(self, cls_tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens (N, D) and masked patches (M, D) to (N, K) and (M, K)."""
        return self.dino_head(cls_tokens), self.ibot_head(patches)


class ReferenceStep3(ReferenceStep):
    """One step of DINOv3; with `koleo.scope` all, neighbours are among the images of all ranks."""

    network = ReferenceNetwork3

    def backward(
        self, shares: Sequence[Share], targets: Sequence[tuple[Tensor, Tensor]]
    ) -> dict[str, float]:
        """Gradients of the mean over ranks; the losses as logged."""
        logged: dict[str, float] = {}
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        with self._autocast():
            tokens = [self._tokens(share) for share in shares]
            views = [torch.stack(of_global.chunk(2)) for of_global, _, _ in tokens]  # (2, B, D)
            for rank, share in enumerate(shares):
                losses = self._terms(share, tokens[rank], targets[rank])
                losses["koleo_loss"] = self._koleo(views, rank)
                total = total + self._weighted(losses) / len(shares)
                for name, loss in losses.items():
                    logged[name] = logged.get(name, 0.0) + loss.item() / len(shares)
        total.backward()
        return logged

    def _tokens(self, share: Share) -> tuple[Tensor, Tensor, Tensor]:
        """Class tokens of global and of local crops, and patches of global ones."""
        of_global, patches = self.student.backbone(
            share.global_crops.flatten(0, 1), share.masks.flatten(0, 1)
        )
        of_local, _ = self.student.backbone(share.local_crops.flatten(0, 1), local=True)
        return of_global, of_local, patches

    def _terms(
        self,
        share: Share,
        tokens: tuple[Tensor, Tensor, Tensor],
        targets: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        of_global, of_local, patches = tokens
        masks, temp = share.masks.flatten(0, 1), self.config.dino.student_temp
        class_logits, patch_logits = self.student.logits(
            torch.cat((of_global, of_local)), patches[masks]
        )
        global_logits, local_logits = class_logits.split([len(of_global), len(of_local)])
        crops = local_logits.chunk(len(share.local_crops))
        swapped = torch.cat(targets[0].chunk(2)[::-1])
        return {
            "dino_local_crops_loss": dino_loss(crops, swapped.chunk(2), temp) / (2 * len(crops)),
            "dino_global_crops_loss": dino_loss([global_logits], [swapped], temp),
            "ibot_loss": ibot_loss(patch_logits, targets[1], masks, temp),
        }

    def _koleo(self, views: Sequence[Tensor], rank: int) -> Tensor:
        """Mean over both views of a rank's loss."""
        if self.config.koleo.scope == "rank":
            return sum(koleo_loss(view) for view in views[rank]) / 2
        losses = []
        for view in torch.cat(list(views), dim=1):
            x = F.normalize(view, p=2, dim=-1, eps=1e-8)
            products = (x @ x.T).detach().fill_diagonal_(-1)
            distances = F.pairwise_distance(x, x[products.argmax(dim=1)], p=2, eps=1e-8)
            losses.append(-torch.log(distances + 1e-8).chunk(len(views))[rank].mean())
        return sum(losses) / 2

    def _weighted(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The total, from the losses as logged: means over pairs, and over views."""
        config, crops = self.config, self.config.crops.num_local
        pairs = 2 + 2 * crops
        of_class = 2 * losses["dino_global_crops_loss"] / pairs
        local = 2 * crops * losses["dino_local_crops_loss"] / pairs
        return (
            config.dino.loss_weight * (of_class + self.local_weight * local)
            + 2 * config.koleo.loss_weight * losses["koleo_loss"]
            + config.ibot.loss_weight * losses["ibot_loss"]
        )
