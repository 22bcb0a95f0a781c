"""The training step of DINOv2, written literally: the yardstick of `tests.benchmarks.step_dinov2`.

Slow on purpose: one forward per resolution, attention by its definition, all logits of both heads
in memory, a log-softmax for every view, Sinkhorn-Knopp on the whole matrix, clipping and averaging
tensor by tensor. All ranks of a step are here in one process, a `Share` each. Source: Oquab et al.
2023 (arXiv:2304.07193) and what the authors' code does; parameters have its names.
`tests/golden23/test_reference.py` compares it with recorded runs of that code.
Differs: bf16 autocast where the authors had fp16 with a loss scaler; float64 where weights are.

Shape letters: B images of a rank, n local crops, N images of a forward, P patches, L = 1 + R + P
tokens, D width, M masked patches, K prototypes, W ranks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoscale.config import RunConfig
from dinoscale.config.sections.backbones import named_vit_size
from dinoscale.config.sections.heads import HeadConfig
from dinoscale.engine.schedules import StepValues
from dinoscale.errors import ConfigError
from tests.reference import Attention, Mlp, PatchEmbed

_EPS = 1e-6  # of layer norms, and beside the norms that clip
_KOLEO_EPS = 1e-8
_SINKHORN_ITERATIONS = 3
_NUM_GLOBAL = 2


_NAMES = (  # in our networks, in the reference's
    ("patch_head.", "ibot_head."),
    ("head.", "dino_head."),
    ("backbone.reg_token", "backbone.register_tokens"),
)


def weights_of(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """The state dict of one of our networks with the reference's names."""
    renamed = {}
    for name, value in state.items():
        for ours, theirs in _NAMES:
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        if config.model.ffn == "swiglu":
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        renamed[name] = value
    return renamed


class Share(NamedTuple):
    """What one rank sees of a step.

    Attributes:
        global_crops: (2, B, C, H, W).
        local_crops: (n, B, C, h, w), n >= 1.
        masks: masked patches of the global crops, (2, B, P) bool.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor


class LayerScale(nn.Module):
    """A trained factor per channel."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(initial * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class SwiGlu(nn.Module):
    """w3 (silu(w1 x) * (w2 x)), w1 and w2 packed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """x + scaled attention, then x + scaled MLP, each computed for some of the images only."""

    def __init__(self, dim: int, num_heads: int, config: RunConfig, drop_path: float) -> None:
        super().__init__()
        initial = config.model.layer_scale or 1.0
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, initial)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp: nn.Module = SwiGlu(dim) if config.model.ffn == "swiglu" else Mlp(dim)
        self.ls2 = LayerScale(dim, initial)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = self._add(x, lambda kept: self.ls1(self.attn(self.norm1(kept))))
        return self._add(x, lambda kept: self.ls2(self.mlp(self.norm2(kept))))

    def _add(self, x: Tensor, branch: Any) -> Tensor:
        if self.drop_path == 0.0 or not self.training:
            return x + branch(x)
        kept = max(int(len(x) * (1 - self.drop_path)), 1)
        rows = torch.randperm(len(x), device=x.device)[:kept]
        residual = branch(x[rows]).to(x.dtype)
        return torch.index_add(x, 0, rows, residual, alpha=len(x) / kept)


class ReferenceViT(nn.Module):
    """Images of one size, some patches masked, to their normalised tokens."""

    def __init__(self, config: RunConfig, *, drop_path_rate: float) -> None:
        super().__init__()
        model = config.model
        named = named_vit_size(model.backbone)
        assert named is not None  # see _require_known
        dim = model.embed_dim or named.embed_dim
        heads, depth = model.num_heads or named.num_heads, model.depth or named.depth
        self.patch_size = model.effective_patch_size or 0
        self.by_size = (
            model.position_resize or ("by_size" if model.registers else "")
        ) == "by_size"
        patches = (config.crops.global_size // self.patch_size) ** 2
        self.patch_embed = PatchEmbed(config.data.channels, dim, self.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, model.registers, dim)) if model.registers else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        if model.drop_path_uniform:
            rates = [drop_path_rate] * depth
        self.blocks = nn.ModuleList(Block(dim, heads, config, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class tokens (N, D) and patches (N, P, D); `masks` (N, P) bool."""
        x = self.patch_embed(images)
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self._positions(*images.shape[2:])
        registers = 0
        if self.register_tokens is not None:
            registers = self.register_tokens.shape[1]
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + registers :]

    def _positions(self, height: int, width: int) -> Tensor:
        stored = self.pos_embed.shape[1] - 1
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows * columns == stored and height == width:
            return self.pos_embed
        side = math.isqrt(stored)
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if self.by_size:
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        else:
            scale = ((rows + 0.1) / side, (columns + 0.1) / side)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat((self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)


class WeightNorm(nn.Module):
    """A linear layer without bias whose rows are g v / ||v||, g trained."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        norms = self.weight_v.norm(dim=1, keepdim=True)
        return F.linear(x, self.weight_v * (self.weight_g / norms))


class ReferenceHead(nn.Module):
    """MLP, unit sphere, weight-normalised prototypes."""

    def __init__(self, in_dim: int, head: HeadConfig) -> None:
        super().__init__()
        widths = [in_dim, *[head.hidden_dim] * (head.num_layers - 1), head.bottleneck_dim]
        layers: list[nn.Module] = []
        for i in range(head.num_layers):
            layers += [nn.Linear(widths[i], widths[i + 1]), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = WeightNorm(head.bottleneck_dim, head.num_prototypes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2, eps=1e-12))


class ReferenceNetwork(nn.Module):
    """Backbone and heads; without a head of their own, patches go through that of the class."""

    def __init__(self, config: RunConfig, *, drop_path_rate: float) -> None:
        super().__init__()
        self.backbone = ReferenceViT(config, drop_path_rate=drop_path_rate)
        dim = self.backbone.cls_token.shape[-1]
        self.dino_head = ReferenceHead(dim, config.head)
        self.ibot_head = (
            None if config.patch_head is None else ReferenceHead(dim, config.patch_head)
        )

    def logits(self, cls_tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens (N, D) and masked patches (M, D) to (N, K) and (M, K)."""
        if self.ibot_head is not None:
            return self.dino_head(cls_tokens), self.ibot_head(patches)
        of_both = self.dino_head(torch.cat((cls_tokens, patches)))
        return of_both[: len(cls_tokens)], of_both[len(cls_tokens) :]


class ReferenceStep:
    """Student, teacher, centers and optimizer of the reference, and one step of them.

    Attributes:
        student: the trained network.
        teacher: its average.
        centers: of class and patch logits, `dino` and `ibot`, (1, K); zeros with Sinkhorn-Knopp.
        grad_norms: of each tensor in the last step, before clipping.
        local_weight: of the class tokens' loss on local crops, in DINOv3.
    """

    network: type[nn.Module] = ReferenceNetwork
    local_weight = 1.0

    def __init__(
        self, config: RunConfig, device: torch.device, weights: Mapping[str, Tensor]
    ) -> None:
        """Start student and teacher from `weights`, named and typed as the reference's.

        Raises:
            ConfigError: the reference has nothing of the kind.
        """
        self.config, self._device = config, device
        _require_known(config)
        self._bf16 = config.engine.precision == "bf16"
        dtype = next(iter(weights.values())).dtype
        rate = config.model.drop_path_rate
        self.student: Any = self.network(config, drop_path_rate=rate).to(device, dtype)
        self.teacher: Any = self.network(config, drop_path_rate=0.0).to(device, dtype).eval()
        for network in (self.student, self.teacher):
            network.load_state_dict(weights)
        self.teacher.requires_grad_(False)
        patch_head = config.patch_head or config.head
        self.centers = {
            "dino": torch.zeros(1, config.head.num_prototypes, dtype=dtype, device=device),
            "ibot": torch.zeros(1, patch_head.num_prototypes, dtype=dtype, device=device),
        }
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self.student, config), betas=config.optim.betas
        )
        self.grad_norms: dict[str, float] = {}

    def __call__(self, shares: Sequence[Share], now: StepValues) -> dict[str, float]:
        """Take a step; the losses as the reference logs them, means over ranks.

        Args:
            shares: of every rank.
            now: the scheduled numbers.
        """
        for group in self._optimizer.param_groups:
            rate = 0.0 if group["last_layer"] and now.prototypes_frozen else now.lr
            group["lr"] = rate * group["lr_multiplier"]
            group["weight_decay"] = now.weight_decay * group["wd_multiplier"]
        with torch.no_grad(), self._autocast():
            targets = self._targets(shares, now.teacher_temp)
        self._optimizer.zero_grad()
        logged = self.backward(shares, targets)
        if not math.isfinite(sum(logged.values())):
            raise FloatingPointError(f"losses are {logged}")
        self._clip_gradients()
        self._optimizer.step()
        with torch.no_grad():
            pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
            for of_student, of_teacher in pairs:
                of_teacher.data.mul_(now.momentum).add_((1 - now.momentum) * of_student.data)
        return logged

    def backward(
        self, shares: Sequence[Share], targets: Sequence[tuple[Tensor, Tensor]]
    ) -> dict[str, float]:
        """Gradients of the mean over ranks; the losses as logged."""
        logged: dict[str, float] = {}
        for share, target in zip(shares, targets, strict=True):
            with self._autocast():
                losses = self._losses(share, *target)
            (self._total(losses) / len(shares)).backward()
            for name, loss in losses.items():
                logged[name] = logged.get(name, 0.0) + loss.item() / len(shares)
        return logged

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16)

    def _targets(self, shares: Sequence[Share], temp: float) -> list[tuple[Tensor, Tensor]]:
        """Of each rank, targets of the class tokens (2B, K) and of the masked patches (M, K)."""
        of_class, of_patches = [], []
        for share in shares:
            cls_tokens, patches = self.teacher.backbone(share.global_crops.flatten(0, 1))
            masked = patches[share.masks.flatten(0, 1)]
            for logits, list_ in zip(
                self.teacher.logits(cls_tokens, masked), (of_class, of_patches), strict=True
            ):
                list_.append(_at_least_float32(logits))
        if self.config.dino.targets == "sinkhorn_knopp":
            both = sinkhorn_knopp(of_class, temp), sinkhorn_knopp(of_patches, temp)
        else:
            both = (
                [F.softmax((x - self.centers["dino"]) / temp, dim=-1) for x in of_class],
                [F.softmax((x - self.centers["ibot"]) / temp, dim=-1) for x in of_patches],
            )
            self._update_center("dino", of_class)
            self._update_center("ibot", of_patches)
        return list(zip(*both, strict=True))

    def _update_center(self, name: str, logits: Sequence[Tensor]) -> None:
        """With the mean over ranks of each rank's mean."""
        mean = sum(of_rank.mean(0, keepdim=True) for of_rank in logits) / len(logits)
        momentum = self.config.dino.center_momentum
        self.centers[name] = self.centers[name] * momentum + mean * (1 - momentum)

    def _losses(
        self, share: Share, class_targets: Tensor, patch_targets: Tensor
    ) -> dict[str, Tensor]:
        """The losses of a rank, as logged."""
        config, batch = self.config, share.global_crops.shape[1]
        masks = share.masks.flatten(0, 1)  # (2B, P)
        of_global, patches = self.student.backbone(share.global_crops.flatten(0, 1), masks)
        of_local, _ = self.student.backbone(share.local_crops.flatten(0, 1))
        class_logits, patch_logits = self.student.logits(
            torch.cat((of_local, of_global)), patches[masks]
        )
        local_logits = class_logits[: len(of_local)].split(batch)
        global_logits = class_logits[len(of_local) :]
        temp = config.dino.student_temp
        terms = _NUM_GLOBAL * len(local_logits) + _NUM_GLOBAL * (_NUM_GLOBAL - 1)
        swapped = torch.cat(class_targets.chunk(2)[::-1])
        return {
            "dino_local_crops_loss": dino_loss(local_logits, swapped.chunk(2), temp) / terms,
            "dino_global_crops_loss": 2 * dino_loss([global_logits], [swapped], temp) / terms,
            "koleo_loss": config.koleo.loss_weight
            * sum(koleo_loss(view) for view in of_global.chunk(2))
            / _NUM_GLOBAL,
            "ibot_loss": ibot_loss(patch_logits, patch_targets, masks, temp) / _NUM_GLOBAL,
        }

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """What is minimized, from the losses as logged."""
        config = self.config
        of_class = losses["dino_local_crops_loss"] + losses["dino_global_crops_loss"]
        return (
            config.dino.loss_weight * of_class
            + _NUM_GLOBAL * losses["koleo_loss"]
            + config.ibot.loss_weight * _NUM_GLOBAL * losses["ibot_loss"]
        )

    def _clip_gradients(self) -> None:
        """To a norm over the backbone, and over each head."""
        clip = self.config.optim.clip_grad
        for part, network in self.student.named_children():
            gradients = {
                f"{part}.{name}": parameter.grad
                for name, parameter in network.named_parameters()
                if parameter.grad is not None
            }
            norms = {name: gradient.norm(2).item() for name, gradient in gradients.items()}
            self.grad_norms |= norms
            factor = clip / (math.hypot(*norms.values()) + _EPS)
            if clip and factor < 1:
                for gradient in gradients.values():
                    gradient.mul_(factor)


def _require_known(config: RunConfig) -> None:
    """Refuse what the authors' code, or this writing of it, does not do."""
    model, optim = config.model, config.optim
    heads = [config.head, *([] if config.patch_head is None else [config.patch_head])]
    for differs, setting in (
        (named_vit_size(model.backbone) is None, f"model.backbone={model.backbone}"),
        (any(head.batch_norm for head in heads), "head.batch_norm=true"),
        (any(head.norm_last_layer for head in heads), "head.norm_last_layer=true"),
        (
            model.drop_path_rate and model.drop_path_mode != "subset",
            f"model.drop_path_mode={model.drop_path_mode}",
        ),
        (not config.crops.num_local, "crops.num_local=0"),
        (not config.ibot.loss_weight, "ibot.loss_weight=0"),
        (config.dino.freeze_last_layer_by != "zero_rate", "dino.freeze_last_layer_by=skipping"),
        (optim.name != "adamw", f"optim.name={optim.name}"),
        (optim.clip_mode != "per_network", f"optim.clip_mode={optim.clip_mode}"),
    ):
        if differs:
            raise ConfigError(f"{setting}: the literal reference has no such thing")


def parameter_groups(student: ReferenceNetwork, config: RunConfig) -> list[dict[str, Any]]:
    """One for each tensor: the multipliers of its rate and decay, whether it is of prototypes."""
    groups = []
    depth, optim = len(student.backbone.blocks), config.optim
    for name, parameter in student.named_parameters():
        layer = depth + 1
        if name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif any(part in name for part in ("pos_embed", "patch_embed", "_token")):
            layer = 0
        lr_multiplier = optim.layer_decay ** (depth + 1 - layer)
        if "patch_embed" in name:
            lr_multiplier *= optim.patch_embed_lr
        no_decay = name.endswith(".bias") or "norm" in name or "gamma" in name
        groups.append(
            {
                "params": [parameter],
                "name": name,
                "lr_multiplier": lr_multiplier,
                "wd_multiplier": 0.0 if no_decay else 1.0,
                "last_layer": "last_layer" in name,
            }
        )
    return groups


def sinkhorn_knopp(of_ranks: Sequence[Tensor], temp: float) -> list[Tensor]:
    """Of each rank, logits (M_r, K) to targets: prototypes are used equally over all ranks."""
    parts = [torch.exp(logits / temp).T for logits in of_ranks]  # (K, M_r)
    num_samples = sum(q.shape[1] for q in parts)
    num_prototypes = parts[0].shape[0]
    total = sum(q.sum() for q in parts)
    parts = [q / total for q in parts]
    for _ in range(_SINKHORN_ITERATIONS):
        row_sums = sum(q.sum(dim=1, keepdim=True) for q in parts)  # over all ranks
        parts = [q / row_sums / num_prototypes for q in parts]
        parts = [q / q.sum(dim=0, keepdim=True) / num_samples for q in parts]
    return [(q * num_samples).T for q in parts]


def dino_loss(student: Sequence[Tensor], targets: Sequence[Tensor], temp: float) -> Tensor:
    """Cross-entropies of all pairs, each a mean over its rows, added."""
    total = torch.zeros((), dtype=targets[0].dtype, device=targets[0].device)
    for logits in student:
        log_q = F.log_softmax(_at_least_float32(logits) / temp, dim=-1)
        for target in targets:
            total = total - (target * log_q).sum(-1).mean()
    return total


def ibot_loss(logits: Tensor, targets: Tensor, masks: Tensor, temp: float) -> Tensor:
    """Mean over crops, masked or not, of the mean cross-entropy of a crop's masked patches."""
    log_q = F.log_softmax(_at_least_float32(logits) / temp, dim=-1)  # (M, K)
    weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]  # (M,)
    return -((targets * log_q).sum(-1) * weights).sum() / len(masks)


def koleo_loss(class_tokens: Tensor) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest neighbour on the unit sphere."""
    with torch.autocast(class_tokens.device.type, enabled=False):
        x = F.normalize(_at_least_float32(class_tokens), p=2, dim=-1, eps=_KOLEO_EPS)
        products = (x @ x.T).detach()
        products.fill_diagonal_(-1)
        distances = F.pairwise_distance(x, x[products.argmax(dim=1)], p=2, eps=_KOLEO_EPS)
        return -torch.log(distances + _KOLEO_EPS).mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
