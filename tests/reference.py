"""The training step of the reference, written literally; the yardstick of `dinoscale bench step`.

Slow on purpose: one forward per resolution, attention by its definition, a log-softmax for every
pair of views, clipping and averaging tensor by tensor. Source: Caron et al. 2021
(arXiv:2104.14294), algorithm 1, and what the authors' code does; parameters have its names. Its
input pipeline is `tests.reference_input`.
Differs: bf16 autocast where the authors had fp16 with a loss scaler.

Shape letters: B images of this rank, S = 2 + n student crops, N images of a forward, P patches,
L = 1 + P tokens, D width, K prototypes.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinoscale.config import RunConfig
from dinoscale.engine.build import build_networks
from dinoscale.engine.schedules import StepValues
from dinoscale.errors import ConfigError
from dinoscale.models.network import DinoNetwork
from dinoscale.models.vit import VisionTransformer

_EPS = 1e-6  # of layer norms, and beside the norms that clip


class DropPath(nn.Module):
    """Drops a branch for some of the images, after it was computed for all."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        draws = torch.rand((len(x), 1, 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * (keep + draws).floor()


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, the matrix of all pairs in memory."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (N, heads, L, D / heads)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, length, dim))


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention, then x + MLP, each dropped for some of the images."""

    def __init__(self, dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Convolution whose stride is its kernel."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (N, P, D)


class ReferenceViT(nn.Module):
    """Images of one size to their normalised class token."""

    def __init__(self, like: VisionTransformer, *, drop_path_rate: float) -> None:
        """A network of the sizes of `like`, without its weights."""
        super().__init__()
        dim, patch = like.embed_dim, like.patch_size
        first: Any = like.blocks[0]
        self.patch_size = patch
        self.patch_embed = PatchEmbed(like.patch_embed.proj.in_channels, dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros_like(like.pos_embed))
        rates = torch.linspace(0, drop_path_rate, like.depth).tolist()
        heads = first.attn.num_heads
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)  # (N, L, D)
        x = x + self._positions(*images.shape[2:])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, height: int, width: int) -> Tensor:
        stored = self.pos_embed.shape[1] - 1
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows * columns == stored and height == width:
            return self.pos_embed
        side = math.isqrt(stored)
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat((self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)


class ReferenceHead(nn.Module):
    """MLP, unit sphere, weight-normalised prototypes."""

    def __init__(self, in_dim: int, config: RunConfig) -> None:
        super().__init__()
        head = config.head
        widths = [in_dim, *[head.hidden_dim] * (head.num_layers - 1)]
        layers: list[nn.Module] = []
        for wide, out in itertools.pairwise(widths):
            layers += [nn.Linear(wide, out), nn.GELU()]
        last = nn.Linear(widths[-1], head.bottleneck_dim)
        self.mlp = nn.Sequential(*layers, last) if layers else last
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the authors' is deprecated since
            self.last_layer = nn.utils.weight_norm(
                nn.Linear(head.bottleneck_dim, head.num_prototypes, bias=False)
            )
        self.last_layer.weight_g.data.fill_(1)
        self.last_layer.weight_g.requires_grad = not head.norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))


class MultiCropWrapper(nn.Module):
    """One forward of the backbone for each resolution, one of the head for all."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        sides = torch.tensor([crop.shape[-1] for crop in crops])
        counts = torch.unique_consecutive(sides, return_counts=True)[1]
        features, start = torch.empty(0, device=crops[0].device), 0
        for end in torch.cumsum(counts, 0).tolist():
            of_size = self.backbone(torch.cat(list(crops[start:end])))
            features = torch.cat((features, of_size))
            start = end
        return self.head(features)


class ReferenceLoss(nn.Module):
    """The mean over pairs of views, each with its own log-softmax; then the center moves."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.num_crops = 2 + config.crops.num_local
        self.student_temp = config.dino.student_temp
        self.center_momentum = config.dino.center_momentum
        self.register_buffer("center", torch.zeros(1, config.head.num_prototypes))

    def forward(self, student_output: Tensor, teacher_output: Tensor, temp: float) -> Tensor:
        student_out = (student_output / self.student_temp).chunk(self.num_crops)
        teacher_out = F.softmax((teacher_output - self.center) / temp, dim=-1).detach().chunk(2)
        total, pairs = 0.0, 0
        for i, q in enumerate(teacher_out):
            for v in range(len(student_out)):
                if v == i:
                    continue
                loss = torch.sum(-q * F.log_softmax(student_out[v], dim=-1), dim=-1)
                total += loss.mean()
                pairs += 1
        self._update_center(teacher_output)
        return total / pairs

    @torch.no_grad()
    def _update_center(self, teacher_output: Tensor) -> None:
        center = torch.sum(teacher_output, dim=0, keepdim=True)
        world_size = 1
        if dist.is_initialized():
            dist.all_reduce(center)
            world_size = dist.get_world_size()
        center = center / (len(teacher_output) * world_size)
        self.center = self.center * self.center_momentum + center * (1 - self.center_momentum)


class ReferenceStep:
    """Student, teacher, loss and optimizer of the reference, and one step of them.

    Attributes:
        student: the trained network, parameters named as ours.
        teacher: its average.
        loss: with the center.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Start from the weights that a run of ours with this configuration starts from.

        Raises:
            ConfigError: the reference has nothing of the kind.
        """
        _require_known(config)
        torch.backends.cudnn.benchmark = True
        network, _ = build_networks(config)
        self._clip = config.optim.clip_grad
        self._device, self._bf16 = device, config.engine.precision == "bf16"
        self.student = _like(network, config, drop_path_rate=config.model.drop_path_rate).to(device)
        self.teacher = _like(network, config, drop_path_rate=0.0).to(device)
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False
        self.loss = ReferenceLoss(config).to(device)
        self._optimizer = torch.optim.AdamW(_groups(self.student))
        self._wrapped: nn.Module = self.student
        if dist.is_initialized() and dist.get_world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(self.student, device_ids=ids)

    def __call__(self, crops: Sequence[Tensor], now: StepValues) -> float:
        """Take a step; the loss of this rank.

        Args:
            crops: (B, C, H, W) each, the two global ones first.
            now: the scheduled numbers.
        """
        for i, group in enumerate(self._optimizer.param_groups):
            group["lr"] = now.lr
            if i == 0:  # only what is regularized
                group["weight_decay"] = now.weight_decay
        crops = [crop.to(self._device, non_blocking=True) for crop in crops]
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            teacher_output = self.teacher(crops[:2])
            student_output = self._wrapped(crops)
            loss = self.loss(student_output, teacher_output, now.teacher_temp)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss is {loss.item()}")
        self._optimizer.zero_grad()
        loss.backward()
        self._clip_gradients()
        if now.prototypes_frozen:
            for name, parameter in self.student.named_parameters():
                if "last_layer" in name:
                    parameter.grad = None
        self._optimizer.step()
        with torch.no_grad():
            pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
            for of_student, of_teacher in pairs:
                of_teacher.data.mul_(now.momentum).add_((1 - now.momentum) * of_student.data)
        return loss.item()

    def _clip_gradients(self) -> None:
        if not self._clip:
            return
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                factor = self._clip / (parameter.grad.norm(2).item() + _EPS)
                if factor < 1:
                    parameter.grad.mul_(factor)


def _require_known(config: RunConfig) -> None:
    """Refuse what the authors' code, or this writing of it, does not do."""
    for differs, setting in (
        (config.model.backbone == "resnet50", "model.backbone=resnet50"),
        (config.head.batch_norm, "head.batch_norm=true"),
        (config.optim.name != "adamw", f"optim.name={config.optim.name}"),
        (config.optim.clip_mode != "per_tensor", f"optim.clip_mode={config.optim.clip_mode}"),
    ):
        if differs:
            raise ConfigError(f"{setting}: the literal reference has no such thing")


def _like(network: DinoNetwork, config: RunConfig, *, drop_path_rate: float) -> MultiCropWrapper:
    """A network of the reference with the weights of ours."""
    backbone = ReferenceViT(network.backbone, drop_path_rate=drop_path_rate)
    copy = MultiCropWrapper(backbone, ReferenceHead(network.backbone.embed_dim, config))
    state = network.state_dict()
    state.setdefault("head.last_layer.weight_g", torch.ones(config.head.num_prototypes, 1))
    try:
        copy.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f"model.backbone: {config.model.backbone!r} is no plain ViT of the literal reference"
        ) from error
    return copy


def _groups(network: nn.Module) -> list[dict[str, Any]]:
    """Weights, which decay, and biases and norms, which do not."""
    decays, rests = [], []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            no_decay = name.endswith(".bias") or parameter.ndim == 1
            (rests if no_decay else decays).append(parameter)
    return [{"params": decays}, {"params": rests, "weight_decay": 0.0}]
