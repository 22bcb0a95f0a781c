"""Linear classifiers on frozen tokens: the choice of tokens, and many classifiers at once.

Shape letters: N images, n last blocks, P patches, D width of a token, K width of a classifier's
input, G classifiers of one kind of input, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoscale.evaluate.classification.accuracy import answers, num_correct

INIT_STD = 0.01  # of a classifier's weights, normal with mean 0; biases start at 0
MOMENTUM = 0.9  # of SGD; the published codes of both protocols, without weight decay
_LOGITS_AT_ONCE = 2**24  # 64 MiB of float32


class TokenFeatures(nn.Module):
    """Class tokens of the last n blocks, oldest first, then the mean patch token of the last.

    All go through the final norm. For a ResNet it is the pooled output alone.

    Attributes:
        blocks: n.
        embed_dim: width of a row, (n + 1) D, or D.
        token_dim: D.
        output_key: what a row holds, in words, for the cache.
    """

    def __init__(self, backbone: nn.Module, *, blocks: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.blocks = blocks
        self.token_dim = int(backbone.embed_dim)  # type: ignore[arg-type]  # an int
        self.embed_dim = self.token_dim * (blocks + 1 if is_vit(backbone) else 1)
        self.output_key = f"class tokens of the last {blocks} blocks, mean patch token of the last"

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Take one tensor of images (N, C, H, W) in a list; return (N, embed_dim)."""
        (images,) = crops
        if not is_vit(self.backbone):
            return self.backbone(crops)  # type: ignore[no-any-return]  # nn.Module calls
        patch = int(self.backbone.patch_size)  # type: ignore[arg-type]  # an int
        num_patches = (images.shape[2] // patch) * (images.shape[3] // patch)
        layers: list[Tensor] = self.backbone.intermediate(images, self.blocks)  # type: ignore[operator]  # a method
        pooled = layers[-1][:, -num_patches:].mean(dim=1)  # registers come before the patches
        return torch.cat([*(tokens[:, 0] for tokens in layers), pooled], dim=1)


def is_vit(backbone: nn.Module) -> bool:
    """Whether the backbone has class tokens after each block."""
    return hasattr(backbone, "intermediate")


@dataclass(frozen=True)
class FeatureKind:
    """Which tokens a classifier takes.

    Attributes:
        blocks: number of last blocks whose class tokens are joined.
        pooled: also the mean patch token of the last block.
        interleaved: channel by channel instead of token by token, as in the published ViT-B
            classifiers; matters only for a comparison of weights.
    """

    blocks: int
    pooled: bool
    interleaved: bool = False

    def take(self, features: Tensor, *, stored: int, token_dim: int) -> Tensor:
        """Select the tokens from rows of `TokenFeatures` of `stored` blocks: (N, ...) to (N, K)."""
        tokens = torch.unflatten(features, 1, (-1, token_dim))
        tokens = tokens[:, stored - self.blocks : stored + (1 if self.pooled else 0)]
        if self.interleaved:
            tokens = tokens.transpose(1, 2)
        return torch.flatten(tokens, 1)


class LinearHeads:
    """G linear classifiers of one input, each with its own learning rate, as one matrix.

    SGD with momentum 0.9 on the mean cross-entropy of each classifier, independent of the others:
    v <- 0.9 v + gradient; weight <- weight - rate v.

    Attributes:
        weight: (G, C, K).
        bias: (G, C).
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_classes: int,
        width: int,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(num_heads, num_classes, width, generator=generator, dtype=dtype)
        self.weight = (INIT_STD * drawn).to(device)
        self.bias = self.weight.new_zeros(num_heads, num_classes)
        self._weight_velocity = torch.zeros_like(self.weight)
        self._bias_velocity = torch.zeros_like(self.bias)

    def state(self) -> dict[str, Tensor]:
        """Weights and momentum of the classifiers; further training changes these tensors."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "weight_velocity": self._weight_velocity,
            "bias_velocity": self._bias_velocity,
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def logits(self, x: Tensor) -> Tensor:
        """Scores (N, G, C) of rows (N, K)."""
        flat = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
        return torch.unflatten(flat, 1, self.bias.shape)

    def step(self, x: Tensor, labels: Tensor, rates: Tensor) -> None:
        """Take one SGD step with all classifiers.

        Args:
            x: (N, K).
            labels: (N,) int64.
            rates: learning rate of each classifier, (G,).
        """
        target = F.one_hot(labels, self.bias.shape[1])[:, None]  # (N, 1, C)
        gradient = (self.logits(x).softmax(dim=-1) - target) / len(x)  # of the logits, (N, G, C)
        moved = torch.mm(gradient.flatten(1).T, x).view_as(self.weight)
        self._weight_velocity.mul_(MOMENTUM).add_(moved)
        self._bias_velocity.mul_(MOMENTUM).add_(gradient.sum(dim=0))
        self.weight.sub_(rates[:, None, None] * self._weight_velocity)
        self.bias.sub_(rates[:, None] * self._bias_velocity)

    def finite(self) -> list[bool]:
        """For each classifier, whether all its weights are finite: it has not diverged."""
        flat = torch.cat([self.weight.flatten(1), self.bias], dim=1)  # (G, C K + C)
        return flat.isfinite().all(dim=1).tolist()

    def num_correct(self, x: Tensor, labels: Tensor) -> list[tuple[int, int]]:
        """For each classifier, how many rows (N, K) are correct by top-1 and by top-5."""
        top1, top5 = torch.zeros(2, len(self.bias), dtype=torch.int64, device=x.device)
        rows = self._rows_at_once()
        for some, classes in zip(x.split(rows), labels.split(rows), strict=True):
            more1, more5 = num_correct(self.logits(some), classes)
            top1, top5 = top1 + more1, top5 + more5
        return list(zip(top1.tolist(), top5.tolist(), strict=True))

    def answers(self, x: Tensor, at: int) -> Tensor:
        """The class that one of the classifiers gives each row of (N, K), as it counts: (N,)."""
        # With all others, as `num_correct`: a product of other shape may differ in its last bits.
        return torch.cat(
            [answers(self.logits(some)[:, at]) for some in x.split(self._rows_at_once())]
        )

    def _rows_at_once(self) -> int:
        return max(1, _LOGITS_AT_ONCE // self.bias.numel())
