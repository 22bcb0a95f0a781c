"""Between the reduction of gradients and the update: judge them, clip them, rest the prototypes.

Nothing here waits for the device. Norms, factors and the verdict whether a step may be applied are
tensors; the fused optimizers of torch read the verdict, `found_inf`, where they run and leave
weights, moments and step counts alone if it is 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinoscale.runtime import distributed

EPS = 1e-6  # added to the norm, as in the reference


class GradientRule:
    """Clipping, per tensor or global, and no update at all for what rests or is not finite.

    `measure` sees all gradients of a step before DeepSpeed hands the first group to the optimizer,
    at stages 1-3 one group after the other; hooks around the optimizer's `step` do the rest.

    Facts 1.9, with n = ||g||_2 of a tensor or of all: g <- g * min(1, clip / (n + 1e-6)).
    Norms are summed over shards with one small all-reduce a step.

    Attributes:
        names: of all parameters that any rank's shards hold, in the same order on all ranks.
        squared_norms: of their gradients in the last step before clipping, (len(names),) float32.
        skipped: whether the last step was not applied, () bool; equal on all ranks.
    """

    def __init__(self, *, clip: float, per_tensor: bool, sharded: bool) -> None:
        """`clip` 0 leaves gradients alone; `sharded` is true at ZeRO stages 1-3."""
        self.clip = clip
        self.per_tensor = per_tensor
        self.sharded = sharded
        self.names: list[str] = []
        self.squared_norms = torch.tensor(torch.nan)  # until the first step
        self._armed = False
        self._device = compute_device()
        self._pieces: dict[int, list[tuple[int, int, int]]] = {}  # slot, offset, numel
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
        slots = {name: len(self.names) + index for index, name in enumerate(names)}
        self.names += names
        self._pieces[id(tensor)] = [(slots[name], start, n) for name, start, n in pieces]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Run before and after every `step` of `optimizer`; until `arm`, nothing moves in one."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def arm(self) -> None:
        """Let steps count: all tensors have been watched, and DeepSpeed has had its zero step."""
        slots = [slot for pieces in self._pieces.values() for slot, *_ in pieces]
        self._slots = torch.tensor(slots, dtype=torch.int64, device=self._device)
        self._armed = True

    @torch.no_grad()
    def measure(self, gradients: list[Tensor], *, spoilt: Tensor) -> None:
        """Decide what the step that follows does with its gradients.

        Args:
            gradients: mean of all micro-batches and ranks, a tensor for each piece in the order of
                the `watch` calls, any float dtype.
            spoilt: whether the step must not be applied whatever they are, () bool.
        """
        squared = torch.zeros(len(self.names), device=self._device)
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
            squared.index_copy_(0, self._slots, norms.to(self._device).square())
        if self.sharded:
            distributed.all_reduce_sum(squared)
        whole = squared.sum()
        self.squared_norms = squared
        self.skipped = spoilt | ~whole.isfinite()
        norm = squared.sqrt() if self.per_tensor else whole.sqrt()  # (len(names),) or ()
        self._factor = (self.clip / (norm + EPS)).clamp(max=1.0)

    def global_norm(self) -> Tensor:
        """Norm of all gradients of the last step before clipping, scalar float32."""
        return self.squared_norms.sum().sqrt()

    def _before(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        stepping = []
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                if group["frozen"] or not self._armed:
                    # No gradient, no step: no decay, no moments, no step count (facts 1.8).
                    self._resting.append((tensor, tensor.grad))
                    tensor.grad = None
                else:
                    stepping.append(tensor)
        if not stepping:
            return
        if self.clip:
            self._scale(stepping)
        # To host memory the copy waits, but what is offloaded has waited for its gradients before.
        optimizer.found_inf = self.skipped.to(stepping[0].device, torch.float32)  # type: ignore[attr-defined]
        if isinstance(optimizer, torch.optim.SGD):
            for tensor in stepping:  # a first one of its own would be left unset by a skipped step
                if not optimizer.state[tensor]:
                    optimizer.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)

    def _after(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for tensor, grad in self._resting:
            tensor.grad = grad
        self._resting.clear()

    @torch.no_grad()
    def _scale(self, tensors: list[Tensor]) -> None:
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        factor = self._factor.to(gradients[0].device)
        if not self.per_tensor:
            torch._foreach_mul_(gradients, factor)
            return
        views, factors, of_names = [], [], factor.unbind()
        for tensor, gradient in zip(tensors, gradients, strict=True):
            flat = gradient.view(-1)
            for slot, offset, numel in self._pieces[id(tensor)]:
                views.append(flat.narrow(0, offset, numel))
                factors.append(of_names[slot])
        if views:
            torch._foreach_mul_(views, factors)


def compute_device() -> torch.device:
    """Where networks and collectives run: the accelerator even when shards are offloaded."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
