"""At stage 3 a micro-batch gathers each layer three times: teacher, student forward, backward."""

from typing import Any

import pytest
import torch

from tests.distributed.test_ema import Recorder
from tests.distributed.tiny_run import micro_batches, tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

DEPTH, MICRO_BATCHES = 3, 2
NUM_LAYERS = DEPTH + 7  # tokens and positions, patches, blocks, norm, 3 of the head, prototypes


def count_gathers(checkpointed: int) -> dict[str, Any]:
    """On every rank: the all-gathers of a step whose weights are released as soon as may be."""
    from dinoscale.engine import ds_config
    from dinoscale.engine.build import build_pair, schedules_of
    from dinoscale.engine.step import train_step

    ds_config.LIVE_ELEMENTS = 1  # keep nothing gathered, fetch nothing ahead
    config = tiny_config(
        model={"depth": DEPTH},
        train={"batch_size": 4 * MICRO_BATCHES, "micro_batch_size": 2},
        engine={
            "zero_stage": 3,
            "precision": "bf16",
            "checkpoint_every_k_blocks": checkpointed,
        },
    )
    plan = tiny_plan(config)
    assert plan.accumulation_steps == MICRO_BATCHES
    student, teacher = build_pair(config, plan)
    now = schedules_of(config, plan).at(0)
    for step in range(2):  # the first learns the order of the layers
        with Recorder() as recorder:
            train_step(micro_batches(config, plan, step), student, teacher, now, student_temp=0.1)
    return {
        "gathers": [elements for name, elements in recorder.calls if "allgather" in name],
        "parameters": sum(torch.Size(shape).numel() for shape in student.shapes.values()),
    }


@pytest.mark.parametrize("checkpointed", [0, 1])
def test_layers_are_gathered_once_forward_once_backward_and_once_for_the_teacher(
    checkpointed: int,
) -> None:
    for of_rank in run_distributed(
        "tests.distributed.test_gathers:count_gathers",
        world_size=2,
        timeout_s=580,
        checkpointed=checkpointed,
    ):
        gathers, size = of_rank["gathers"], len(of_rank["gathers"]) // MICRO_BATCHES
        assert gathers[:size] * MICRO_BATCHES == gathers
        layers = gathers[:NUM_LAYERS]  # the teacher's forward
        assert layers.count(max(layers)) == DEPTH  # a block is one
        assert 0 <= sum(layers) - of_rank["parameters"] <= 2 * len(layers) * 20  # and padding
        assert gathers[NUM_LAYERS : 2 * NUM_LAYERS] == layers  # the student's
        prototypes = layers[-1]  # the last of the forward, still there as the backward begins
        assert sorted([*gathers[2 * NUM_LAYERS : size], prototypes]) == sorted(layers)
