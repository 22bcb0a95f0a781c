"""Projection head: a small MLP, L2 normalisation, and products with K prototypes.

Shape letters: N rows, D width of the backbone, K prototypes.
Source: Caron et al. 2021 (arXiv:2104.14294), section 3.2 and appendix C; Salimans and Kingma 2016
(arXiv:1602.07868) for weight normalisation; Simeoni et al. 2025 (arXiv:2508.10104) without it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoscale.models.cpu_bf16 import Linear

# (unit vectors (N, D), v (K, D), g (K, 1) or None, plain) -> scalar, without the (N, K) logits.
OfPrototypes = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


def prototype_logits(
    x: Tensor, weight_v: Tensor, weight_g: Tensor | None, plain: bool = False
) -> Tensor:
    """Logits of unit vectors: logit_k = <x, g_k v_k / ||v_k||>, or <x, v_k> of plain prototypes.

    Normalisation and product run in float32 (float64 for float64 weights), also under autocast:
    logits are divided by a temperature near 0.04, for which bfloat16's 8 bits are too few.

    Args:
        x: (N, D), any float dtype.
        weight_v: v, (K, D).
        weight_g: g, (K, 1), or None for ones.
        plain: the prototypes are v.

    Returns:
        (N, K) float32 or float64.
    """
    dtype = torch.promote_types(weight_v.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        weight = weight_v.to(dtype) if plain else F.normalize(weight_v.to(dtype), dim=-1)
        if weight_g is not None:
            weight = weight * weight_g.to(dtype)
        return F.linear(x.to(dtype), weight)


class PrototypeLayer(nn.Module):
    """Linear layer without bias whose rows have norm g, see `prototype_logits`.

    A plain tensor instead of `torch.nn.utils.weight_norm`, which ZeRO-3 cannot shard; the rows
    keep the default Linear initialisation, uniform in +-1/sqrt(in_dim), as in the authors' code.
    """

    def __init__(self, in_dim: int, num_prototypes: int, *, trainable_norm: bool) -> None:
        super().__init__()
        if trainable_norm:
            self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1))
        else:
            self.register_parameter("weight_g", None)  # all ones, and no parameter
        linear = nn.Linear(in_dim, num_prototypes, bias=False)
        self.weight_v = nn.Parameter(linear.weight.detach())

    def forward(self, x: Tensor, objective: OfPrototypes = prototype_logits) -> Tensor:
        """Map unit vectors (N, in_dim) to logits (N, K), float32 or float64, or to a scalar.

        An objective is computed here, where ZeRO-3 has gathered the prototypes once, so that the
        logits are never stored all at once.
        """
        return objective(x, self.weight_v, self.weight_g, False)


class PlainPrototypes(nn.Module):
    """Linear layer without bias or normalisation, normal with std 0.02: logits are no cosines."""

    def __init__(self, in_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_prototypes, in_dim))
        nn.init.normal_(self.weight, std=0.02)  # truncation at +-2 would change nothing

    def forward(self, x: Tensor, objective: OfPrototypes = prototype_logits) -> Tensor:
        """As `PrototypeLayer.forward`."""
        return objective(x, self.weight, None, True)


class DinoHead(nn.Module):
    """MLP (D -> hidden -> ... -> bottleneck), L2 normalisation, prototypes.

    Linear layers start normal with std 0.02 and zero bias. Parameter names are those of
    the authors' code: mlp.0, mlp.2, mlp.4 (0, 3, 6 with batch norm at 1 and 4; plain `mlp` for a
    single layer), last_layer.weight_v, or last_layer.weight of plain prototypes.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        num_prototypes: int,
        hidden_dim: int,
        bottleneck_dim: int,
        num_layers: int,
        norm_last_layer: bool,
        batch_norm: bool,
        weight_norm: bool = True,
    ) -> None:
        """Build the head.

        Args:
            in_dim: D.
            num_prototypes: K.
            hidden_dim: width of the hidden layers.
            bottleneck_dim: dimension of the normalised vectors.
            num_layers: linear layers of the MLP, >= 1.
            norm_last_layer: prototypes have unit norm, so logits are cosines; else it trains.
            batch_norm: batch norm after every hidden layer.
            weight_norm: the prototypes are weight-normalised; else plain, as in DINOv3.

        Raises:
            ValueError: num_layers < 1.
        """
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"need num_layers >= 1, got {num_layers}")
        layers: list[nn.Module] = []
        width = in_dim
        for _ in range(num_layers - 1):
            layers.append(Linear(width, hidden_dim))
            if batch_norm:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
            width = hidden_dim
        layers.append(Linear(width, bottleneck_dim))
        self.mlp = layers[0] if num_layers == 1 else nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = (
            PrototypeLayer(bottleneck_dim, num_prototypes, trainable_norm=not norm_last_layer)
            if weight_norm
            else PlainPrototypes(bottleneck_dim, num_prototypes)
        )

    def unit_vectors(self, x: Tensor) -> Tensor:
        """Map features (N, D) to what meets the prototypes: (N, bottleneck), float32 or float64."""
        x = self.mlp(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.normalize(x.to(dtype), dim=-1, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, D) to logits (N, K), float32, or float64 for float64 weights."""
        logits: Tensor = self.last_layer(self.unit_vectors(x))
        return logits
