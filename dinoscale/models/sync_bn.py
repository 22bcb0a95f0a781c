"""Batch norm over the images of all ranks, on any device; torch's own refuses CPU tensors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose training statistics cover the rows of all ranks.

    `all_reduce` sums a tensor over ranks and, in the backward pass, its gradient; it is the
    identity for a single process. Parameters, buffers and evaluation are those of `nn.BatchNorm*d`;
    buffers must stay float32 (`cast_weights`), as a running average in bf16 stops moving.
    """

    all_reduce: Callable[[Tensor], Tensor] = staticmethod(lambda summand: summand)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, ...) per channel; statistics in float32, or float64 for float64."""
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.training:
            weight, bias = (
                None if value is None else value.to(z.dtype) for value in (self.weight, self.bias)
            )
            evaluated = F.batch_norm(
                z, self.running_mean, self.running_var, weight, bias, eps=self.eps
            )
            return evaluated.to(x.dtype)
        others = [dim for dim in range(x.ndim) if dim != 1]
        shape = (1, -1, *(1 for _ in others[1:]))
        sums = self.all_reduce(torch.cat((z.sum(others), z.new_full((1,), x.numel() / x.shape[1]))))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = z - mean.view(shape)
        var = self.all_reduce(centered.square().sum(others)) / count
        self._track(mean.detach(), var.detach() * count / (count - 1).clamp(min=1))
        z = centered * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            z = z * self.weight.view(shape) + self.bias.view(shape)
        return z.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(var.to(self.running_var.dtype), rate)


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of a network, not its buffers, to `dtype`, in place."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def convert_sync_batch_norm(module: nn.Module, all_reduce: Callable[[Tensor], Tensor]) -> None:
    """Turn every batch norm inside `module` into a `SyncBatchNorm`, in place, names unchanged."""
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.__class__ = SyncBatchNorm  # same parameters, buffers and settings
            assert isinstance(child, SyncBatchNorm)
            child.all_reduce = all_reduce
