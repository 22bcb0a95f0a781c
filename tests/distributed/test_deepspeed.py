"""Canaries: what a run takes for granted of DeepSpeed, and a release of it may break in silence."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.models.network import DinoNetwork
from tests.distributed.tiny_run import micro_batches, take_step, tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

_ALIGNED = {"num_prototypes": 32, "hidden_dim": 24, "bottleneck_dim": 16}


class _Twice(DinoNetwork):
    """Applies its head to the first and the second half of the features by two calls."""

    def forward(self, crops: Any, keep: Any = None, objective: Any = None) -> Tensor:
        halves = self.backbone(crops, keep).chunk(2)
        loss: Tensor = self.head(halves[0], objective) + 2 * self.head(halves[1], objective)
        return loss


def _loss(unit: Tensor, weight_v: Tensor, _: None) -> Tensor:
    return (unit.float() @ weight_v.float().T).pow(3).mean()


def watch() -> dict[str, Any]:
    """On every rank: what became of each of the tests below."""
    return {
        "gradients": {stage: _gradients(stage) for stage in range(4)},
        "traces": _traces(),
        "gathered": _gathered(),
        "unaligned": [_unaligned(stage) for stage in (1, 2)],
    }


def _two_passes(stage: int, **changes: Any) -> RunConfig:
    engine = {"zero_stage": stage, "precision": "fp32", **changes.pop("engine", {})}
    train = {"micro_batch_size": 2, "batch_size": 4 * torch.distributed.get_world_size()}
    return tiny_config(train=train, engine=engine, **changes)


def _gradients(stage: int) -> float:
    """Largest difference of a gradient's norm from that of one process, relative to its norm."""
    from dinoscale import distributed
    from dinoscale.engine.build import build_networks, schedules_of
    from dinoscale.engine.student import Student, gather_whole_blocks

    config = _two_passes(stage)
    plan = tiny_plan(config)
    (network, _), (alone, _) = build_networks(config), build_networks(config)
    network.__class__ = alone.__class__ = _Twice
    if stage == 3:
        gather_whole_blocks(network)
    student = Student(network, config, plan)
    student.set_hyperparameters(schedules_of(config, plan).at(0))
    batches = [
        [batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)]
        for batch in micro_batches(config, plan, 0)
    ]
    for index, crops in enumerate(batches):
        student.backward(student(crops, None, _loss))
        if index == 0:
            student.accumulate()
    student.step(spoilt=torch.tensor(False))
    everywhere = [crops for of_rank in distributed.gather_objects(batches) for crops in of_rank]
    for crops in everywhere:
        (alone(crops, None, _loss) / len(everywhere)).backward()
    expected = {n: float(p.grad.norm()) for n, p in alone.named_parameters() if p.grad is not None}
    found = student.grad_norms()
    assert found.keys() == expected.keys()
    whole = max(expected.values())
    student.close()
    return max(abs(found[name] - expected[name]) for name in found) / whole


def _traces() -> list[tuple[bool, bool]]:
    """Stage 3: after each step, whether student and teacher know the order of their layers."""
    from dinoscale.engine.build import build_pair

    config = _two_passes(3, model={"drop_path_rate": 0.5, "drop_path_mode": "subset"})
    plan = tiny_plan(config)
    student, teacher = build_pair(config, plan)
    of_student = student._zero.parameter_offload.get_param_coordinator()
    of_teacher = teacher._weights._engine.optimizer.get_param_coordinator()
    known = []
    for step in range(5):
        take_step(student, teacher, config, plan, step)
        known.append((of_student.is_complete_trace(), of_teacher.is_complete_trace()))
        with torch.no_grad():  # as k-NN does
            teacher.plain_network().eval()([torch.zeros(1, 3, 16, 16)])
    return known


def _gathered() -> list[str]:
    """Stage 3: the weights, some of them frozen, that stay gathered after recomputed blocks."""
    from dinoscale.engine.build import build_networks, schedules_of
    from dinoscale.engine.student import Student, gather_whole_blocks

    config = _two_passes(3, engine={"checkpoint_every_k_blocks": 1, "live_elements": 1})
    plan = tiny_plan(config)
    network, _ = build_networks(config)
    network.backbone.blocks[1].get_submodule("mlp").requires_grad_(False)
    gather_whole_blocks(network)
    student = Student(network, config, plan)
    student.set_hyperparameters(schedules_of(config, plan).at(0))
    batch = micro_batches(config, plan, 0)[0]
    student.backward(student([batch.global_crops.flatten(0, 1)], None, _loss))
    return [
        name
        for name, parameter in student.network.named_parameters()
        if parameter.ds_status.name != "NOT_AVAILABLE"
    ]


def _unaligned(stage: int) -> list[str]:
    """Weights in bf16 that do not begin at a multiple of 16 bytes, though their sizes would do."""
    from dinoscale.engine.build import build_pair

    changes = {"model": {"embed_dim": 16}, "head": _ALIGNED, "engine": {"precision": "bf16"}}
    config = _two_passes(stage, **changes)
    student, teacher = build_pair(config, tiny_plan(config))
    networks = {"student": student.network, "teacher": teacher.plain_network()}
    return [
        f"{owner} {name}"
        for owner, network in networks.items()
        for name, parameter in network.named_parameters()
        if parameter.data_ptr() % 16
    ]


@pytest.fixture(scope="module")
def watched() -> list[dict[str, Any]]:
    """Of each of two ranks, what `watch` saw."""
    return run_distributed(f"{__name__}:watch", world_size=2, timeout_s=580)


def test_head_applied_twice_in_accumulated_passes_has_the_gradient_of_one_process(
    watched: list[dict[str, Any]],
) -> None:
    for of_rank in watched:
        assert max(of_rank["gradients"].values()) < 1e-5, of_rank["gradients"]


def test_order_of_layers_is_known_from_the_third_step_on(watched: list[dict[str, Any]]) -> None:
    for of_rank in watched:
        assert of_rank["traces"][2:] == [(True, True)] * 3


def test_weights_are_released_after_a_recomputation_the_frozen_ones_too(
    watched: list[dict[str, Any]],
) -> None:
    assert [of_rank["gathered"] for of_rank in watched] == [[], []]


def test_weights_lie_where_vector_loads_can_read_them(watched: list[dict[str, Any]]) -> None:
    assert [of_rank["unaligned"] for of_rank in watched] == [[[], []]] * 2
