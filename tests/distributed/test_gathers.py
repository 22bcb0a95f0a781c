"""Communication of a step: at stage 3 each layer thrice per micro-batch, else as planned.

All steps are taken on 2 ranks in one launch.
"""

from collections import Counter
from typing import Any

import pytest
import torch

from dinoscale.config import RunConfig, resolve
from dinoscale.engine.model_sizes import dims_of
from dinoscale.planning.plan.communication import transfers
from dinoscale.planning.plan.partition import setup_of
from tests.distributed.test_ema import Recorder
from tests.distributed.tiny_run import dinov2, micro_batches, tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

DEPTH, MICRO_BATCHES = 3, 2
NUM_LAYERS = DEPTH + 7  # tokens and positions, patches, blocks, norm, 3 of the head, prototypes


DINO, RECIPE = "dino", "recipe"
CENTERING, SINKHORN, PATCH_HEAD = "centering", "sinkhorn_knopp", "patch head"
OPTIM = {RECIPE: {"layer_decay": 0.8, "patch_embed_lr": 0.2, "clip_mode": "per_network"}}
OBJECTIVES = {
    CENTERING: dinov2("centering", patch_head=False),
    SINKHORN: dinov2("sinkhorn_knopp", patch_head=False),
    PATCH_HEAD: dinov2("sinkhorn_knopp", patch_head=True),
}
Job = tuple[int, int, str]  # stage, checkpoint_every_k_blocks, what differs from DINO
JOBS: list[Job] = [
    *((stage, 0, DINO) for stage in (1, 2, 3)),
    (3, 1, DINO),
    *((stage, 0, what) for stage in (2, 3) for what in (RECIPE, *OBJECTIVES)),
]


def _config(job: Job) -> RunConfig:
    stage, checkpointed, what = job
    return tiny_config(
        **OBJECTIVES.get(what, {}),
        optim={"lr": 0.1, "warmup_epochs": 0, **OPTIM.get(what, {})},
        model={"depth": DEPTH},
        train={"batch_size": 4 * MICRO_BATCHES, "micro_batch_size": 2},
        engine={
            "zero_stage": stage,
            "precision": "bf16",
            "checkpoint_every_k_blocks": checkpointed,
            "stage3_max_live_parameters": 1,  # keep nothing gathered, fetch nothing ahead
        },
    )


def watch_steps(jobs: list[Job]) -> list[dict[str, Any]]:
    """On every rank: the collectives of a step whose weights are released as early as possible."""
    return [_watch_step(job) for job in jobs]


def _watch_step(job: Job) -> dict[str, Any]:
    from dinoscale.engine.build import build_pair, loss_weights_of, schedules_of
    from dinoscale.engine.step import train_step

    config = _config(job)
    plan = tiny_plan(config)
    assert plan.accumulation_steps == MICRO_BATCHES
    student, teacher = build_pair(config, plan)
    now = schedules_of(config, plan).at(0)
    for step in range(2):  # the first learns the order of the layers
        with Recorder() as recorder:
            train_step(
                micro_batches(config, plan, step),
                student,
                teacher,
                now,
                loss_weights=loss_weights_of(config),
            )
    return {
        "calls": recorder.calls,
        "parameters": sum(torch.Size(shape).numel() for shape in student.shapes.values()),
    }


@pytest.fixture(scope="module")
def watched() -> list[dict[Job, dict[str, Any]]]:
    """Of each rank, what each of `JOBS` sent."""
    function = "tests.distributed.test_gathers:watch_steps"
    per_rank = run_distributed(function, world_size=2, timeout_s=580, jobs=JOBS)
    return [dict(zip(JOBS, of_rank, strict=True)) for of_rank in per_rank]


@pytest.mark.parametrize("checkpointed", [0, 1])
def test_layers_are_gathered_once_forward_once_backward_and_once_for_the_teacher(
    watched: list[dict[Job, dict[str, Any]]], checkpointed: int
) -> None:
    for of_rank in watched:
        run = of_rank[3, checkpointed, DINO]
        gathers = [elements for name, elements in run["calls"] if "allgather" in name]
        size = len(gathers) // MICRO_BATCHES
        assert gathers[:size] * MICRO_BATCHES == gathers
        layers = gathers[:NUM_LAYERS]  # the teacher's forward
        assert layers.count(max(layers)) == DEPTH  # a block is one
        assert 0 <= sum(layers) - run["parameters"] <= 2 * len(layers) * 20  # and padding
        assert gathers[NUM_LAYERS : 2 * NUM_LAYERS] == layers  # the student's
        prototypes = layers[-1]  # the last of the forward, still there as the backward begins
        assert sorted([*gathers[2 * NUM_LAYERS : size], prototypes]) == sorted(layers)


@pytest.mark.parametrize("stage", [2, 3])
def test_rates_by_layer_and_clipping_by_network_send_nothing_more(
    watched: list[dict[Job, dict[str, Any]]], stage: int
) -> None:
    for of_rank in watched:
        assert of_rank[stage, 0, RECIPE]["calls"] == of_rank[stage, 0, DINO]["calls"] != []


@pytest.mark.parametrize("stage", [1, 2])
def test_plan_predicts_what_is_sent(watched: list[dict[Job, dict[str, Any]]], stage: int) -> None:
    of_rank = watched[0][stage, 0, DINO]
    config = _config((stage, 0, DINO))
    run = resolve(config, world_size=2, num_images=4 * MICRO_BATCHES)
    setup = setup_of(config, run, on_gpu=False)
    planned = {"all-reduce": 0.0, "all-gather": 0.0}
    for transfer in transfers(dims_of(config), setup):
        reduced = transfer.collective == "all-reduce"
        of_number = setup.communication_bytes if reduced else setup.weight_bytes
        # A rank of two sends every number once to reduce them, half of them to gather them.
        planned[transfer.collective] += transfer.sent_bytes / of_number * (1 if reduced else 2)
    for collective, elements in planned.items():
        name = collective.replace("-", "")
        sent = sum(elements for call, elements in of_rank["calls"] if name in call)
        assert sent == pytest.approx(elements, rel=0.02), collective  # norms, losses, center


@pytest.mark.parametrize("stage", [2, 3])
def test_objective_of_dinov2_adds_the_sums_of_sinkhorn_knopp_and_the_weights_of_its_head(
    watched: list[dict[Job, dict[str, Any]]], stage: int
) -> None:
    runs = {what: watched[0][stage, 0, what] for what in (DINO, *OBJECTIVES)}
    dino, centering, sinkhorn, patch_head = (Counter(_names(run)) for run in runs.values())
    assert centering == dino  # which has neither masks nor a patch head
    assert sinkhorn - centering == Counter({"c10d::allreduce_": 8})
    for run, patch_prototypes in ((runs[SINKHORN], 33), (runs[PATCH_HEAD], 29)):
        # A maximum and three sums of class tokens, and of masked patches, before all others.
        sizes = [elements for name, elements in run["calls"] if name == "c10d::allreduce_"]
        assert sizes[:8] == [33] * 4 + [patch_prototypes] * 4
    # Of the patch head at stage 3 its four layers, thrice per micro-batch like the others.
    gathers = {"c10d::_allgather_base_": MICRO_BATCHES * 3 * 4} if stage == 3 else {}
    assert patch_head - sinkhorn == Counter(gathers)


def _names(run: dict[str, Any]) -> list[str]:
    return [name for name, _ in run["calls"]]
