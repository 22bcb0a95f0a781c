"""Canaries: what a run relies on in DeepSpeed, and a release of it may break silently."""

import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.models.network import DinoNetwork
from tests.distributed.plain_run import WEIGHTS, without_key_biases
from tests.distributed.tiny_run import micro_batches, take_step, tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

Gradients = dict[str, Tensor]

_ALIGNED = {"num_prototypes": 32, "hidden_dim": 24, "bottleneck_dim": 16}


class _Twice(DinoNetwork):
    """Applies its head to the first and the second half of the features by two calls."""

    def forward(self, crops: Any, keep: Any = None, objective: Any = None, *_: Any) -> Tensor:
        first, second = (
            self.head.last_layer(self.head.unit_vectors(half), objective)
            for half in self.backbone(crops, keep).chunk(2)
        )
        loss: Tensor = first + 2 * second
        return loss


class _Cubes:
    """An objective of one head, see `models.network.Objective`; also as a function of units."""

    wants_patches = False

    def __init__(self, *, exact: bool = False) -> None:
        self._dtype = torch.float64 if exact else torch.float32

    def __call__(self, unit: Tensor, weight_v: Tensor, *_: object) -> Tensor:
        return (unit.to(self._dtype) @ weight_v.to(self._dtype).T).pow(3).mean()

    def of_class_tokens(self, _tokens: Tensor) -> None:
        pass

    def of_prototypes(self, classes: Tensor, _patches: None, *weights: Tensor) -> Tensor:
        return self(classes, *weights)


def watch() -> dict[str, Any]:
    """On every rank: the measurements for each of the tests below."""
    return {
        "gradients": {stage: _gradients(stage) for stage in range(4)},
        "traces": _traces(),
        "gathered": _gathered(),
        "unaligned": [_unaligned(stage) for stage in (1, 2)],
        "compiler": "torch._inductor.compile_fx" in sys.modules,
    }


def _two_passes(stage: int, **changes: Any) -> RunConfig:
    engine = {"zero_stage": stage, "precision": "fp32", **changes.pop("engine", {})}
    train = {"micro_batch_size": 2, "batch_size": 4 * torch.distributed.get_world_size()}
    return tiny_config(train=train, engine=engine, **changes)


def _gradients(stage: int) -> list[Gradients]:
    """In full: the engine's, and those of one process in float32 and in float64."""
    from dinoscale.engine.build import build_networks, schedules_of
    from dinoscale.engine.student import Student, gather_whole_blocks
    from dinoscale.runtime import distributed

    config = _two_passes(stage)
    plan = tiny_plan(config)
    network, _ = build_networks(config)
    network.__class__ = _Twice
    if stage == 3:
        gather_whole_blocks(network)
    student = Student(network, config, plan)
    student.set_hyperparameters(schedules_of(config, plan).at(0))
    batches = [
        [batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)]
        for batch in micro_batches(config, plan, 0)
    ]
    for index, crops in enumerate(batches):
        student.backward(student(crops, None, _Cubes()))
        if index == 0:
            student.accumulate()
    pieces = [
        (held.name, held.start, gradient.flatten().clone())
        for held, gradient in zip(student._held, student._gradients(), strict=True)
    ]
    student.step(non_finite=torch.tensor(False))
    alone, exact = (
        _alone(config, distributed.gather_objects(batches), dtype)
        for dtype in (torch.float32, torch.float64)
    )
    found = {name: torch.full_like(gradient, torch.nan) for name, gradient in alone.items()}
    for name, start, gradient in itertools.chain(*distributed.gather_objects(pieces)):
        found[name].view(-1)[start : start + len(gradient)] = gradient
    norms = torch.tensor([student.grad_norms()[name] for name in found])
    torch.testing.assert_close(norms, torch.stack([g.norm() for g in found.values()]))
    student.close()
    return [found, alone, exact]


def _alone(config: RunConfig, of_ranks: list[Any], dtype: torch.dtype) -> Gradients:
    """Of one process by torch alone, one backward pass a micro-batch."""
    from dinoscale.engine.build import build_networks

    network, _ = build_networks(config)
    network.__class__ = _Twice
    network.to(dtype)
    everywhere = [crops for batches in of_ranks for crops in batches]
    for crops in everywhere:
        objective = _Cubes(exact=dtype == torch.float64)
        (network([crop.to(dtype) for crop in crops], None, objective) / len(everywhere)).backward()
    return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


def _traces() -> list[tuple[bool, bool]]:
    """Stage 3: whether student and teacher have traced their layers' order, after each step."""
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

    config = _two_passes(
        3, engine={"checkpoint_every_k_blocks": 1, "stage3_max_live_parameters": 1}
    )
    plan = tiny_plan(config)
    network, _ = build_networks(config)
    network.backbone.blocks[1].get_submodule("mlp").requires_grad_(False)
    gather_whole_blocks(network)
    student = Student(network, config, plan, ())  # no values: no run freezes weights at stage 3
    student.set_hyperparameters(schedules_of(config, plan).at(0))
    batch = micro_batches(config, plan, 0)[0]
    student.backward(student([batch.global_crops.flatten(0, 1)], None, _Cubes()))
    return [
        name
        for name, parameter in student.network.named_parameters()
        if parameter.ds_status.name != "NOT_AVAILABLE"
    ]


def _unaligned(stage: int) -> list[str]:
    """Weights in bf16 that are not aligned to 16 bytes although their sizes allow it."""
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
        for stage, gradients in of_rank["gradients"].items():
            found, alone, exact = (without_key_biases(g) for g in gradients)
            of_rounding = max(_errors(alone, exact).values())
            errors = _errors(found, exact)
            assert all(e <= WEIGHTS * of_rounding for e in errors.values()), (stage, errors)


def _errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Of each tensor, the norm of its difference relative to its own."""
    assert found.keys() == exact.keys()
    return {n: float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact}


def test_order_of_layers_is_known_from_the_third_step_on(watched: list[dict[str, Any]]) -> None:
    for of_rank in watched:
        assert of_rank["traces"][2:] == [(True, True)] * 3


def test_weights_are_released_after_a_recomputation_the_frozen_ones_too(
    watched: list[dict[str, Any]],
) -> None:
    assert [of_rank["gathered"] for of_rank in watched] == [[], []]


def test_weights_lie_where_vector_loads_can_read_them(watched: list[dict[str, Any]]) -> None:
    assert [of_rank["unaligned"] for of_rank in watched] == [[[], []]] * 2


def test_no_compiler_is_loaded_where_nothing_is_compiled(watched: list[dict[str, Any]]) -> None:
    assert [of_rank["compiler"] for of_rank in watched] == [False, False]
