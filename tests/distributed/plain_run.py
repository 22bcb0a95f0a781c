"""The steps of a run on one process in plain torch, and by how much rounding may change a run.

No bound is specific to a machine: the same steps in float64 are exact, and the same steps in
float32, with the images of a batch in either order, show the effect of rounding on this machine. A
run under test rounds as often, in yet another order.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinoscale.config import RunConfig, RunPlan, resolve
from dinoscale.engine.build import build_networks, schedules_of
from dinoscale.losses.centering import teacher_probs, updated_center
from dinoscale.losses.dino import dino_loss
from tests.distributed.tiny_run import STEPS_PER_EPOCH, distance, micro_batches

WEIGHTS = 3  # times the rounding measured: a norm of thousands of roundings hardly varies
NUMBERS = 8  # times the largest of a few single numbers, and EPS more where all came out exact
EPS = torch.finfo(torch.float32).eps

# Losses, norms, weights of the student and of the teacher, and those that each began with.
Run = dict[str, Any]
Crops = tuple[Tensor, Tensor]  # global and local, (views, B, C, H, W)


@dataclass(frozen=True)
class Plain:
    """Steps in float64, and the largest error of the same steps in float32, each relative."""

    exact: Run
    losses: float
    norms: float
    weights: float
    student_temp: float

    def require(self, run: Run, *, first: int = 0, reference: Run | None = None) -> None:
        """Fail if a run from step `first` on differs by more than rounding explains."""
        reference = reference or self.exact
        self.require_losses(run["losses"], reference["losses"][first:])
        if "norms" in run:
            relative = NUMBERS * (self.norms + EPS)
            assert run["norms"] == pytest.approx(reference["norms"][first:], rel=relative)
        assert error(run, reference) <= WEIGHTS * self.weights

    def require_losses(self, found: list[float], expected: list[float]) -> None:
        """The same of the losses alone."""
        # A logit is a cosine over the temperature, so it is rounded by this much however small
        # the loss.
        of_logits = EPS / 2 / self.student_temp
        relative = NUMBERS * (self.losses + EPS)
        assert found == pytest.approx(expected, rel=relative, abs=of_logits)


@dataclass(frozen=True)
class Rounding:
    """Where the steps are rounded.

    Attributes:
        master: type of weights, moments, average and center.
        network: of the forward and backward passes.
        sums: of the gradients of the ranks, which are added one by one.
        ranks: that share a batch; each has a backward pass of its own.
    """

    master: torch.dtype = torch.float32
    network: torch.dtype = torch.float32
    sums: torch.dtype = torch.float32
    ranks: int = 1


EXACT = Rounding(torch.float64, torch.float64, torch.float64)


def train_plainly(config: RunConfig, *, steps: int, rounding: Rounding = Rounding()) -> Plain:
    """The steps of a configuration, exact and with the error of rounding."""
    exact = _tiny_steps(config, steps, EXACT, backwards=False)
    rounded = [_tiny_steps(config, steps, rounding, backwards=b) for b in (False, True)]
    return Plain(
        exact,
        losses=max(largest_relative(run["losses"], exact["losses"]) for run in rounded),
        norms=max(largest_relative(run["norms"], exact["norms"]) for run in rounded),
        weights=max(error(run, exact) for run in rounded),
        student_temp=config.dino.student_temp,
    )


def error(run: Run, reference: Run) -> float:
    """Distance of student and teacher relative to how far the reference moved.

    The biases of the keys are left out: adding one number to all keys changes no attention, so
    their gradient is zero but for rounding, and AdamW steps along rounding by up to lr. So it does
    for the few other weights whose gradient happens to be near zero: of each tensor the hundredth
    part that is farthest off is left out too, a weight at least. All others must be right.
    """
    errors = []
    for which in ("student", "teacher"):
        found, expected, initial = (
            without_key_biases(weights[which]) for weights in (run, reference, reference["initial"])
        )
        errors.append(_distance_of_most(found, expected) / distance(expected, initial))
    return max(errors)


def _distance_of_most(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    squares = []
    for name, value in found.items():
        ordered = (value.double() - expected[name].double()).square().flatten().sort().values
        squares.append(ordered[: -math.ceil(len(ordered) / 100)].sum())
    return float(torch.stack(squares).sum().sqrt())


def without_key_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network, or their gradients, without the keys' biases."""
    kept = dict(weights)
    for name in weights:
        if name.endswith("attn.qkv.bias"):
            queries, _, values = weights[name].chunk(3)
            kept[name] = torch.cat((queries, values))
    assert any(len(kept[name]) < len(weights[name]) for name in weights)
    return kept


def largest_relative(found: list[float], expected: list[float]) -> float:
    """Largest error relative to the expected number."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _tiny_steps(config: RunConfig, steps: int, rounding: Rounding, *, backwards: bool) -> Run:
    batch_size = config.train.batch_size
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"micro_batch_size": batch_size})}
    )
    plan = resolve(config, world_size=1, num_images=batch_size * STEPS_PER_EPOCH)

    def crops_of(step: int) -> Crops:
        (batch,) = micro_batches(config, plan, step)
        return batch.global_crops, batch.local_crops

    return take_plain_steps(
        config, plan, crops_of, steps=steps, rounding=rounding, backwards=backwards
    )


def take_plain_steps(
    config: RunConfig,
    plan: RunPlan,
    crops_of: Callable[[int], Crops],
    *,
    steps: int,
    rounding: Rounding,
    backwards: bool,
    initial: dict[str, Tensor] | None = None,
    keep_after: Sequence[int] = (),
) -> Run:
    """Train on one process by torch alone.

    Args:
        config: of the run.
        plan: of the run on one process.
        crops_of: step -> whole batch.
        steps: to take.
        rounding: where numbers are rounded.
        backwards: take the images of a batch in reverse order, which changes nothing else.
        initial: weights to start from; those of the configuration's seed otherwise.
        keep_after: numbers of steps after which weights and center are kept, as `states`.
    """
    student, teacher = (network.to(rounding.master) for network in build_networks(config))
    if initial is not None:
        student.load_state_dict(initial)
    teacher.load_state_dict(student.state_dict())
    pairs = [(whole, deepcopy(whole).to(rounding.network)) for whole in (student, teacher)]
    begin = _copy(student)
    optimizer = _optimizer(config, student)
    center = torch.zeros(config.head.num_prototypes, dtype=rounding.master)
    losses, norms, states = [], [], {}
    by_rate = config.dino.freeze_last_layer_by == "zero_rate"
    for step in range(steps):
        now = schedules_of(config, plan).at(step)
        for group in optimizer.param_groups:
            group["lr"] = now.lr * group["factor"]
            group["weight_decay"] = now.weight_decay * group["decays"]
            if by_rate and now.prototypes_frozen and "last_layer" in group["name"]:
                group["lr"] = 0.0
        for whole, low in pairs:
            low.load_state_dict(whole.state_dict())
        crops = [views.to(rounding.network) for views in crops_of(step)]
        if backwards:
            crops = [views.flip(1) for views in crops]
        with torch.no_grad():
            logits = pairs[1][1]([crops[0].flatten(0, 1)]).to(rounding.master)
            targets = teacher_probs(logits.unflatten(0, (2, -1)), center, temp=now.teacher_temp)
        temp = config.dino.student_temp
        losses.append(_backward(*pairs[0], crops, targets, temp=temp, rounding=rounding))
        norms.append(float(_clip(student, config)))
        if now.prototypes_frozen and not by_rate:
            student.head.last_layer.weight_v.grad = None
        optimizer.step()
        with torch.no_grad():
            for average, weight in zip(teacher.parameters(), student.parameters(), strict=True):
                average.lerp_(weight, 1 - now.momentum)
        center = updated_center(center, logits.mean(0), momentum=config.dino.center_momentum)
        if step + 1 in keep_after:
            states[step + 1] = {
                "student": _copy(student),
                "teacher": _copy(teacher),
                "center": center,
            }
    return {
        "losses": losses,
        "norms": norms,
        "student": _copy(student),
        "teacher": _copy(teacher),
        "initial": {"student": begin, "teacher": begin},
        "states": states,
    }


def _backward(
    student: nn.Module,
    low: nn.Module,
    crops: list[Tensor],
    targets: Tensor,
    *,
    temp: float,
    rounding: Rounding,
) -> float:
    """Leave the gradients of `low` at the student, the mean over ranks; the mean of the losses."""
    loss = 0.0
    trained = [weight for weight in low.parameters() if weight.requires_grad]
    sums = [torch.zeros_like(weight, dtype=rounding.sums) for weight in trained]
    for share in torch.arange(targets.shape[1]).chunk(rounding.ranks):
        output = low([views[:, share].flatten(0, 1) for views in crops])
        output = output.unflatten(0, (-1, len(share))).to(rounding.master)
        of_rank = dino_loss(output, targets[:, share], student_temp=temp)
        gradients = torch.autograd.grad(of_rank, trained)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.to(rounding.sums)
        loss += of_rank.item() / rounding.ranks
    of_student = [weight for weight in student.parameters() if weight.requires_grad]
    for weight, total in zip(of_student, sums, strict=True):
        weight.grad = total.to(rounding.master) / rounding.ranks
    return loss


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def _optimizer(config: RunConfig, network: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"name": name, "params": [p], "decays": p.ndim > 1, "factor": _rate_factor(name, config)}
        for name, p in network.named_parameters()
    ]
    if config.optim.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.optim.betas)


def _rate_factor(name: str, config: RunConfig) -> float:
    depth = config.model.depth or 0
    if name.startswith("backbone.blocks."):
        below = depth - int(name.split(".")[2])
    elif name.startswith(("backbone.norm.", "head.")):
        below = 0
    else:  # embeddings
        below = depth + 1
    factor = config.optim.layer_decay**below
    if name.startswith("backbone.patch_embed."):
        return factor * config.optim.patch_embed_lr
    return factor * (config.optim.backbone_lr if name.startswith("backbone.") else 1.0)


def _clip(network: nn.Module, config: RunConfig) -> Tensor:
    """Clip as configured with torch's own function; the norm of the whole gradient before."""
    parameters = list(network.parameters())
    norm = nn.utils.clip_grad_norm_(parameters, float("inf"))
    if config.optim.clip_grad and config.optim.clip_mode == "global":
        nn.utils.clip_grad_norm_(parameters, config.optim.clip_grad)
    elif config.optim.clip_grad and config.optim.clip_mode == "per_network":
        for part in network.children():
            nn.utils.clip_grad_norm_(part.parameters(), config.optim.clip_grad)
    elif config.optim.clip_grad:
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, config.optim.clip_grad)
    return norm
