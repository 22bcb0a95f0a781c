"""Between the reduction of gradients and the update: clip tensor by tensor, rest the prototypes.

Registered as step hooks of the torch optimizer that DeepSpeed drives. DeepSpeed hands it flat
float32 shards, one optimizer group at a time at stages 1-3, whole parameters at stage 0; the hook
sees both through the fragments of `shards.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinoscale import distributed

EPS = 1e-6  # added to the norm, as in the reference


class GradientRule:
    """Per-tensor or (stage 0) global clipping, and no update at all for what rests.

    Frozen groups rest, and everything rests while `skipping`: set by the caller before a step, or
    here when a gradient is not finite at stage 0, where all ranks see the same gradients.

    Per tensor, facts 1.9: n = ||g||_2 of the whole tensor, g <- g * min(1, clip / (n + 1e-6)).
    Norms are summed over shards with one small all-reduce a group.
    """

    def __init__(self, *, clip: float, per_tensor: bool, sharded: bool) -> None:
        """`clip` 0 leaves gradients alone; `sharded` is true at ZeRO stages 1-3."""
        self.clip = clip
        self.per_tensor = per_tensor
        self.sharded = sharded
        self.armed = False  # DeepSpeed steps once with zero gradients while it initialises
        self.skipping = False  # set for a step in which nothing may move
        self.pieces: dict[int, list[tuple[str, int, int]]] = {}
        self.names: dict[int, list[str]] = {}
        self.squared_norms: dict[str, Tensor] = {}
        self._resting: list[tuple[Tensor, Tensor]] = []

    def watch(
        self, tensor: Tensor, names: Sequence[str], pieces: Sequence[tuple[str, int, int]]
    ) -> None:
        """Say what an optimizer tensor holds.

        Args:
            tensor: a flat shard, or at stage 0 one parameter.
            names: every parameter that any rank's shard of this group holds, same on all ranks.
            pieces: (name, offset, numel) of the parts of parameters inside this rank's tensor.
        """
        self.names[id(tensor)] = list(names)
        self.pieces[id(tensor)] = list(pieces)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Run before and after every `step` of `optimizer`."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def global_norm(self) -> Tensor:
        """Norm of all gradients of the last step before clipping, scalar float32."""
        if not self.squared_norms:  # the first step was skipped
            return torch.tensor(torch.nan)
        return torch.stack(list(self.squared_norms.values())).sum().sqrt()

    def _before(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        stepping = [
            (group, tensor)
            for group in optimizer.param_groups
            for tensor in group["params"]
            if tensor.grad is not None
        ]
        if self.armed and stepping and not self.skipping:
            self._clip([tensor for _, tensor in stepping])
        for group, tensor in stepping:
            if group["frozen"] or self.skipping or not self.armed:
                # No gradient, no step: no decay, no moments, no step count (facts 1.8).
                self._resting.append((tensor, tensor.grad))
                tensor.grad = None

    def _after(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for tensor, grad in self._resting:
            tensor.grad = grad
        self._resting.clear()

    @torch.no_grad()
    def _clip(self, tensors: list[Tensor]) -> None:
        names = [name for tensor in tensors for name in self.names[id(tensor)]]
        slot = {name: index for index, name in enumerate(names)}
        views, slots = [], []
        for tensor in tensors:
            grad = tensor.grad
            assert grad is not None
            for name, offset, numel in self.pieces[id(tensor)]:
                views.append(grad.view(-1).narrow(0, offset, numel))
                slots.append(slot[name])
        squared = torch.zeros(len(names), device=distributed_device(tensors[0]))
        if views:
            norms = torch.stack(torch._foreach_norm(views)).to(squared.device)
            squared[slots] = norms.square()
        if self.sharded:
            distributed.all_reduce_sum(squared)
        elif not torch.isfinite(squared).all():  # DeepSpeed checks at the other stages
            self.skipping = True
        self.squared_norms.update(zip(names, squared.unbind(), strict=True))
        if self.clip and views:
            self._scale(views, squared, slots)

    def _scale(self, views: list[Tensor], squared: Tensor, slots: list[int]) -> None:
        if self.per_tensor:
            factors = (self.clip / (squared.sqrt() + EPS)).clamp(max=1.0)
        elif not self.sharded:
            factors = (self.clip / (squared.sum().sqrt() + EPS)).clamp(max=1.0).expand_as(squared)
        else:
            return  # the global norm at stages 1-3 is DeepSpeed's, before the first group steps
        factors = factors.to(views[0].device)
        torch._foreach_mul_(views, list(factors[slots].unbind()))


def distributed_device(tensor: Tensor) -> torch.device:
    """Where collectives run: the accelerator even when optimizer shards are offloaded."""
    if tensor.device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device
