"""Options that must not change the numbers, and those that must change them as plain torch does.

All runs take three steps on 2 ranks in one launch; the reference is a loop on one process without
DeepSpeed. The prototypes rest during the first two steps.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinoscale.config import RunConfig, resolve
from dinoscale.engine.build import build_networks, schedules_of
from dinoscale.losses.centering import teacher_probs, updated_center
from dinoscale.losses.dino import dino_loss
from tests.distributed.tiny_run import (
    STEPS_PER_EPOCH,
    Gathering,
    distance,
    micro_batches,
    take_step,
    tiny_config,
    tiny_plan,
)
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 3
CLIP = 0.5  # below the norm of nearly every tensor's gradient, so both ways of clipping act
STAGES = (0, 1, 2, 3)
RECIPES = {
    "adamw_global": {"name": "adamw", "clip_mode": "global", "clip_grad": CLIP},
    "adamw_per_tensor": {"name": "adamw", "clip_mode": "per_tensor", "clip_grad": CLIP},
    "adamw_unclipped": {"name": "adamw", "clip_mode": "per_tensor", "clip_grad": 0.0},
    "sgd_per_tensor": {"name": "sgd", "clip_mode": "per_tensor", "clip_grad": CLIP},
    "sgd_global": {"name": "sgd", "clip_mode": "global", "clip_grad": CLIP},
}
# (stage, recipe, precision, checkpoint_every_k_blocks, offload_optimizer)
Job = tuple[int, str, str, int, bool]
JOBS: list[Job] = [
    *((stage, recipe, "fp32", 0, False) for recipe in RECIPES for stage in STAGES),
    *((stage, "adamw_global", "fp32", every, False) for every in (1, 2) for stage in STAGES),
    *((3, "adamw_global", "bf16", every, False) for every in (0, 1)),
    *((stage, "adamw_per_tensor", "fp32", 0, True) for stage in (1, 2, 3)),
]


def _config(job: Job) -> RunConfig:
    stage, recipe, precision, every, offload = job
    return tiny_config(
        model={"depth": 3},
        dino={"momentum": 0.9, "freeze_last_layer_epochs": 1},
        optim={**RECIPES[recipe], "lr": 0.05, "warmup_epochs": 0, "weight_decay": 0.1},
        engine={
            "zero_stage": stage,
            "precision": precision,
            "checkpoint_every_k_blocks": every,
            "offload_optimizer": offload,
        },
    )


def train_jobs(jobs: list[Job]) -> list[dict[str, Any]]:
    """On every rank: losses, norms before clipping and final weights of each of `jobs`."""
    return [_train_job(job) for job in jobs]


def _train_job(job: Job) -> dict[str, Any]:
    from dinoscale.engine.build import build_pair

    config = _config(job)
    plan = tiny_plan(config)
    student, teacher = build_pair(config, plan)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(take_step(student, teacher, config, plan, step))
        norms.append(float(student.grad_norm()))
    gather = Gathering(student)
    return {
        "losses": losses,
        "norms": norms,
        "student": gather(student.master),
        "teacher": gather(teacher.ema),
    }


def train_plainly(config: RunConfig) -> dict[str, Any]:
    """The same steps on one process by torch alone."""
    images = config.train.batch_size * STEPS_PER_EPOCH
    plan = resolve(config, world_size=1, num_images=images)
    student, teacher = build_networks(config)
    teacher.load_state_dict(student.state_dict())
    initial = _copy(student)
    optimizer = _optimizer(config.optim.name, student)
    center = torch.zeros(config.head.num_prototypes)
    losses, norms = [], []
    for step in range(STEPS):
        now = schedules_of(config, plan).at(step)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = now.lr, now.weight_decay * group["decays"]
        (batch,) = micro_batches(config, plan, step)
        with torch.no_grad():
            logits = teacher([batch.global_crops.flatten(0, 1)])
            targets = teacher_probs(logits.unflatten(0, (2, -1)), center, temp=now.teacher_temp)
        output = student([batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)])
        output = output.unflatten(0, (-1, targets.shape[1]))
        loss = dino_loss(output, targets, student_temp=config.dino.student_temp)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(_clip(student, config)))
        if now.prototypes_frozen:
            student.head.last_layer.weight_v.grad = None
        optimizer.step()
        with torch.no_grad():
            for average, weight in zip(teacher.parameters(), student.parameters(), strict=True):
                average.lerp_(weight, 1 - now.momentum)
        center = updated_center(center, logits.mean(0), momentum=config.dino.center_momentum)
        losses.append(loss.item())
    return {
        "losses": losses,
        "norms": norms,
        "student": _copy(student),
        "teacher": _copy(teacher),
        "initial": initial,
    }


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def _optimizer(name: str, network: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in network.parameters() if (p.ndim > 1) == decays], "decays": decays}
        for decays in (True, False)
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.0)


def _clip(network: nn.Module, config: RunConfig) -> Tensor:
    """Clip as configured with torch's own function; the norm of the whole gradient before."""
    parameters = list(network.parameters())
    norm = nn.utils.clip_grad_norm_(parameters, float("inf"))
    if config.optim.clip_grad and config.optim.clip_mode == "global":
        nn.utils.clip_grad_norm_(parameters, config.optim.clip_grad)
    elif config.optim.clip_grad:
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, config.optim.clip_grad)
    return norm


@pytest.fixture(scope="module")
def trained() -> dict[Job, dict[str, Any]]:
    """What rank 0 returned for each of `JOBS`; one launch for all."""
    function = "tests.distributed.test_options:train_jobs"
    per_rank = run_distributed(function, world_size=2, timeout_s=580, jobs=JOBS)
    return dict(zip(JOBS, per_rank[0], strict=True))


@pytest.fixture(scope="module")
def plain() -> Callable[[str], dict[str, Any]]:
    """Recipe -> what plain torch makes of it."""
    results: dict[str, dict[str, Any]] = {}

    def of(recipe: str) -> dict[str, Any]:
        if recipe not in results:
            results[recipe] = train_plainly(_config((0, recipe, "fp32", 0, False)))
        return results[recipe]

    return of


def _error(run: dict[str, Any], reference: dict[str, Any], initial: dict[str, Tensor]) -> float:
    """Distance of student and teacher relative to how far they moved."""
    return max(
        distance(run[which], reference[which]) / distance(reference[which], initial)
        for which in ("student", "teacher")
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", STAGES)
def test_optimizer_and_clipping_are_those_of_plain_torch(
    trained: dict[Job, dict[str, Any]],
    plain: Callable[[str], dict[str, Any]],
    recipe: str,
    stage: int,
) -> None:
    run, reference = trained[stage, recipe, "fp32", 0, False], plain(recipe)
    assert min(reference["norms"]) > 2 * CLIP
    # Measured: norms 1.6e-6, losses 1.1e-6, weights 1.6e-4 of their way (AdamW without clipping:
    # biases of keys, whose gradient is rounding; 4e-6 for SGD).
    assert run["norms"] == pytest.approx(reference["norms"], rel=5e-6)
    # The last loss is 0.009 nats, and float32 rounds the logits under it by up to 1e-6 each.
    assert run["losses"] == pytest.approx(reference["losses"], rel=5e-6, abs=1e-7)
    assert _error(run, reference, reference["initial"]) < 5e-4


def test_recipes_differ_from_each_other(plain: Callable[[str], dict[str, Any]]) -> None:
    results = [plain(recipe) for recipe in RECIPES]
    for index, run in enumerate(results):
        for other in results[:index]:
            assert _error(run, other, run["initial"]) > 0.05


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_activation_checkpointing_is_bitwise_without_effect(
    trained: dict[Job, dict[str, Any]], stage: int, every: int
) -> None:
    run = trained[stage, "adamw_global", "fp32", every, False]
    _require_equal(run, trained[stage, "adamw_global", "fp32", 0, False])


def test_activation_checkpointing_is_bitwise_without_effect_in_bf16(
    trained: dict[Job, dict[str, Any]],
) -> None:
    run = trained[3, "adamw_global", "bf16", 1, False]
    _require_equal(run, trained[3, "adamw_global", "bf16", 0, False])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizer_gives_the_same_numbers(
    trained: dict[Job, dict[str, Any]], stage: int
) -> None:
    run = trained[stage, "adamw_per_tensor", "fp32", 0, True]
    _require_equal(run, trained[stage, "adamw_per_tensor", "fp32", 0, False])


def _require_equal(run: dict[str, Any], other: dict[str, Any]) -> None:
    assert run["losses"] == other["losses"]
    assert run["norms"] == other["norms"]
    for which in ("student", "teacher"):
        different = [k for k, v in run[which].items() if not torch.equal(v, other[which][k])]
        assert different == [], which
