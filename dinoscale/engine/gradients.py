"""Between gradient reduction and the update: check gradients, clip them, freeze the prototypes.

Nothing here waits for the device. Norms, clipping factors and the decision to skip a step are
tensors. Torch's fused optimizers read the decision, `found_inf`, on the device and leave weights,
moments and step counts unchanged if it is 1.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dinoscale.runtime import distributed

EPS = 1e-6  # added to the norm, as in the reference

ClipMode = Literal["per_tensor", "per_network", "global"]


class GradientRule:
    """Clip gradients, skip frozen groups and steps that are not finite.

    `measure` sees all gradients of a step before DeepSpeed hands the first group to the optimizer
    (at stages 1-3 one group after the other); hooks around the optimizer's `step` apply the rule.

    With n = ||g||_2 of a tensor, of a network (backbone, head, patch_head) or of all tensors:
    g <- g * min(1, clip / (n + 1e-6)), as in the authors' codes. Norms are summed over shards with
    one small all-reduce per step.

    Attributes:
        names: of all parameters that any rank's shards hold, in the same order on all ranks.
        networks: first parts of these names, once armed.
        squared_norms: of their gradients in the last step before clipping, (len(names),) float32.
        skipped: whether the last step was skipped, () bool; equal on all ranks.
    """

    def __init__(self, *, clip: float, mode: ClipMode, sharded: bool) -> None:
        """`clip` 0 clips nothing; `sharded` is true at ZeRO stages 1-3."""
        self.clip = clip
        self.mode = mode
        self.sharded = sharded
        self.names: list[str] = []
        self.networks: list[str] = []
        self.squared_norms = torch.tensor(torch.nan)  # until the first step
        self._armed = False
        self._device = compute_device()
        self._pieces: dict[int, list[tuple[int, int, int]]] = {}  # slot, offset, numel
        self._frozen: list[tuple[Tensor, Tensor]] = []

    def watch(
        self, tensor: Tensor, names: Sequence[str], pieces: Sequence[tuple[str, int, int]]
    ) -> None:
        """Register an optimizer tensor and the parameters that it holds.

        Args:
            tensor: a flat shard, or at stage 0 one parameter.
            names: every parameter that any rank's shard of this group holds, same on all ranks.
            pieces: (name, offset, numel) of the parts of parameters inside this rank's tensor.
        """
        slots = {name: len(self.names) + index for index, name in enumerate(names)}
        self.names += names
        self._pieces[id(tensor)] = [(slots[name], start, n) for name, start, n in pieces]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook into every `step` of `optimizer`; until `arm`, steps change nothing."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def arm(self) -> None:
        """Let steps take effect: all tensors are watched, and DeepSpeed's empty step is over."""
        slots = [slot for pieces in self._pieces.values() for slot, *_ in pieces]
        self._slots = torch.tensor(slots, dtype=torch.int64, device=self._device)
        networks = [name.partition(".")[0] for name in self.names]
        self.networks = list(dict.fromkeys(networks))
        rows = [self.networks.index(network) for network in networks]
        self._network_of = torch.tensor(rows, dtype=torch.int64, device=self._device)
        numbers = torch.arange(len(self.networks), device=self._device)
        self._of_others = numbers[:, None] != self._network_of  # (len(networks), len(names))
        self._armed = True

    @torch.no_grad()
    def measure(self, gradients: list[Tensor], *, non_finite: Tensor) -> None:
        """Compute norms and clipping factors, and decide whether to skip the next step.

        Args:
            gradients: means over all micro-batches and ranks, a tensor for each piece in the order
                of the `watch` calls, any float dtype.
            non_finite: whether the loss is not finite, so that the step is skipped, () bool.
        """
        squared = torch.zeros(len(self.names), device=self._device)
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))
            squared.index_copy_(0, self._slots, norms.to(self._device).square())
        if self.sharded:
            distributed.all_reduce_sum(squared)
        total = squared.sum()
        self.squared_norms = squared
        self.skipped = non_finite | ~total.isfinite()
        if self.mode == "per_tensor":
            norm = squared.sqrt()  # (len(names),)
        elif self.mode == "per_network":
            norm = self.network_norms()[self._network_of]  # (len(names),)
        else:
            norm = total.sqrt()  # ()
        self._factor = (self.clip / (norm + EPS)).clamp(max=1.0)

    def network_norms(self) -> Tensor:
        """Gradient norm of each of `networks` in the last step before clipping, float32."""
        squared = self.squared_norms.expand_as(self._of_others)
        # Not index_add: its order varies on a GPU, and all ranks need the same factors.
        return squared.masked_fill(self._of_others, 0.0).sum(1).sqrt()

    def global_norm(self) -> Tensor:
        """Global gradient norm of the last step before clipping, scalar float32."""
        return self.squared_norms.sum().sqrt()

    def _before(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        stepping = []
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                if group["frozen"] or not self._armed:
                    # Without a gradient torch skips it: no decay, no moments, no step count.
                    self._frozen.append((tensor, tensor.grad))
                    tensor.grad = None
                else:
                    stepping.append(tensor)
        if not stepping:
            return
        if self.clip:
            self._scale(stepping)
        # A copy to host memory waits; with offloading, the host has waited for gradients already.
        optimizer.found_inf = self.skipped.to(stepping[0].device, torch.float32)  # type: ignore[attr-defined]
        if isinstance(optimizer, torch.optim.SGD):
            for tensor in stepping:  # SGD's own buffer would stay unset after a skipped first step
                if not optimizer.state[tensor]:
                    optimizer.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)

    def _after(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for tensor, grad in self._frozen:
            tensor.grad = grad
        self._frozen.clear()

    @torch.no_grad()
    def _scale(self, tensors: list[Tensor]) -> None:
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        factor = self._factor.to(gradients[0].device)
        if self.mode == "global":
            torch._foreach_mul_(gradients, factor)
            return
        views, factors, factor_of_slot = [], [], factor.unbind()
        for tensor, gradient in zip(tensors, gradients, strict=True):
            flat = gradient.view(-1)
            for slot, offset, numel in self._pieces[id(tensor)]:
                views.append(flat.narrow(0, offset, numel))
                factors.append(factor_of_slot[slot])
        if views:
            torch._foreach_mul_(views, factors)


def compute_device() -> torch.device:
    """The device of networks and collectives: the accelerator, even when shards are offloaded."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
