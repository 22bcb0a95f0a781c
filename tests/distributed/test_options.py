"""Options that must not change the numbers, and those that must change them as plain torch does.

All runs take three steps on 2 ranks in one launch; the reference is a loop on one process without
DeepSpeed. The prototypes rest during the first two steps.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dinoscale.config import RunConfig
from tests.distributed.plain_run import Plain, error, train_plainly
from tests.distributed.tiny_run import (
    Gathering,
    micro_batches,
    take_step,
    tiny_config,
    tiny_plan,
)
from tests.golden23.compare import parts_of
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 3
CLIP = 0.5  # below the norm of nearly every tensor's gradient, so both ways of clipping act
STAGES = (0, 1, 2, 3)
CHECKPOINTED = (1, 2)  # stages 0 and 3 with every kind of recomputation: test_compiled.py
DINOV2 = "dinov2"  # its runs meet bad images before steps 0 and 2, which leave no trace
RECIPES = {
    "adamw_global": {"name": "adamw", "clip_mode": "global", "clip_grad": CLIP},
    "adamw_per_tensor": {"name": "adamw", "clip_mode": "per_tensor", "clip_grad": CLIP},
    "adamw_unclipped": {"name": "adamw", "clip_mode": "per_tensor", "clip_grad": 0.0},
    "sgd_per_tensor": {"name": "sgd", "clip_mode": "per_tensor", "clip_grad": CLIP},
    "sgd_global": {"name": "sgd", "clip_mode": "global", "clip_grad": CLIP},
    DINOV2: {
        "clip_mode": "per_network",
        "clip_grad": CLIP,
        "betas": (0.8, 0.95),
        "layer_decay": 0.8,
        "patch_embed_lr": 0.2,
        "backbone_lr": 0.5,
    },
}
# Not at every stage: SGD is taken at each with one way of clipping, AdamW at each with both.
SOME_STAGES = {"adamw_unclipped": (0, 3), "sgd_per_tensor": (1, 2), "sgd_global": (0, 3)}
# (stage, recipe, checkpoint_every_k_blocks, offload_optimizer)
Job = tuple[int, str, int, bool]
JOBS: list[Job] = [
    *((stage, recipe, 0, False) for recipe in RECIPES for stage in SOME_STAGES.get(recipe, STAGES)),
    *((stage, "adamw_global", 1, False) for stage in CHECKPOINTED),
    *((stage, "adamw_per_tensor", 0, True) for stage in (1, 2, 3)),
    *((stage, DINOV2, 0, True) for stage in (1, 2, 3)),
]


def _config(job: Job) -> RunConfig:
    stage, recipe, every, offload = job
    return tiny_config(
        model={"depth": 3},
        dino={
            "momentum": 0.9,
            "freeze_last_layer_epochs": 1,
            "freeze_last_layer_by": "zero_rate" if recipe == DINOV2 else "skipping",
        },
        optim={**RECIPES[recipe], "lr": 0.05, "warmup_epochs": 0, "weight_decay": 0.1},
        engine={
            "zero_stage": stage,
            "precision": "fp32",
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
        if job[1] == DINOV2 and step in (0, 2):
            _take_bad_step(student, teacher, config, plan, step)
        losses.append(take_step(student, teacher, config, plan, step))
        norms.append(float(student.grad_norm()))
        of_networks = parts_of(student.grad_norms())
        assert student.network_grad_norms() == pytest.approx(of_networks, rel=1e-5)
    gather = Gathering(student)
    return {
        "losses": losses,
        "norms": norms,
        "student": gather(student.master),
        "teacher": gather(teacher.ema),
        "steps": student.optimizer_steps(),
    }


def _take_bad_step(student: Any, teacher: Any, config: RunConfig, plan: Any, step: int) -> None:
    from dinoscale.engine.build import loss_weights_of, schedules_of
    from dinoscale.engine.step import train_step
    from dinoscale.runtime import distributed

    batches = micro_batches(config, plan, 99)
    if distributed.rank() == 0:
        batches[0].global_crops[0, 0, 0, 0, 0] = torch.nan
    now = schedules_of(config, plan).at(step)
    weights = loss_weights_of(config)
    result = train_step(batches, student, teacher, now, loss_weights=weights)
    assert result.skipped


@pytest.fixture(scope="module")
def trained() -> dict[Job, dict[str, Any]]:
    """What rank 0 returned for each of `JOBS`; one launch for all."""
    function = "tests.distributed.test_options:train_jobs"
    per_rank = run_distributed(function, world_size=2, timeout_s=580, jobs=JOBS)
    return dict(zip(JOBS, per_rank[0], strict=True))


@pytest.fixture(scope="module")
def plain() -> Callable[[str], Plain]:
    """Recipe -> the results of plain torch."""
    results: dict[str, Plain] = {}

    def of(recipe: str) -> Plain:
        if recipe not in results:
            results[recipe] = train_plainly(_config((0, recipe, 0, False)), steps=STEPS)
        return results[recipe]

    return of


@pytest.mark.parametrize(("stage", "recipe"), [job[:2] for job in JOBS if job[2:] == (0, False)])
def test_optimizer_and_clipping_are_those_of_plain_torch(
    trained: dict[Job, dict[str, Any]], plain: Callable[[str], Plain], recipe: str, stage: int
) -> None:
    reference = plain(recipe)
    assert min(reference.exact["norms"]) > 2 * CLIP
    reference.require(trained[stage, recipe, 0, False])


def test_recipes_differ_from_each_other(plain: Callable[[str], Plain]) -> None:
    results = [plain(recipe).exact for recipe in RECIPES]
    for index, run in enumerate(results):
        for other in results[:index]:
            assert error(run, other) > 0.05


@pytest.mark.parametrize("stage", CHECKPOINTED)
def test_activation_checkpointing_changes_no_bit(
    trained: dict[Job, dict[str, Any]], stage: int
) -> None:
    run = trained[stage, "adamw_global", 1, False]
    _require_equal(run, trained[stage, "adamw_global", 0, False])


@pytest.mark.parametrize("recipe", ["adamw_per_tensor", DINOV2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizer_gives_the_same_numbers(
    trained: dict[Job, dict[str, Any]], stage: int, recipe: str
) -> None:
    run = trained[stage, recipe, 0, True]
    _require_equal(run, trained[stage, recipe, 0, False])


@pytest.mark.parametrize("stage", STAGES)
def test_prototypes_at_a_rate_of_zero_count_steps_and_skipped_ones_do_not(
    trained: dict[Job, dict[str, Any]], stage: int
) -> None:
    for recipe, of_prototypes in (("adamw_global", STEPS - 2), (DINOV2, STEPS)):
        steps = trained[stage, recipe, 0, False]["steps"]
        assert steps["decay"] == STEPS
        assert steps.get("prototypes", of_prototypes) == of_prototypes  # on ranks that hold some


def _require_equal(run: dict[str, Any], other: dict[str, Any]) -> None:
    assert run["losses"] == other["losses"]
    assert run["norms"] == other["norms"]
    for which in ("student", "teacher"):
        different = [k for k, v in run[which].items() if not torch.equal(v, other[which][k])]
        assert different == [], which
