"""The sharded teacher: its average, its forward weights, its communication and its memory."""

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.tiny_run import (
    Gathering,
    distance,
    micro_batches,
    take_step,
    tiny_config,
    tiny_plan,
)
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

STAGES = (0, 1, 2, 3)
MOMENTUM = 0.9999
STEPS = 20
PRECISIONS = ("bf16", "fp32")
# A step rounds each weight of the average by half an ulp at most, so they end this far from the
# float64 one, relative to their norm, if every rounding went the same way. An average kept in bf16
# misses as much as the way it should go.
ROUNDING_OF_A_STEP = torch.finfo(torch.float32).eps / 2


def follow_student(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On every rank: train, and also average the student's master in float64 and in bf16."""
    return [_follow_student(**run) for run in runs]


def _follow_student(stage: int, precision: str) -> dict[str, Any]:
    from dinoscale.engine.build import build_pair

    config = tiny_config(
        model={"depth": 1},
        crops={"num_local": 0},
        train={"epochs": STEPS, "batch_size": 2},
        dino={"momentum": MOMENTUM, "momentum_end": MOMENTUM, "freeze_last_layer_epochs": 0},
        optim={"lr": 1.0, "warmup_epochs": 0},
        engine={"zero_stage": stage, "precision": precision},
    )
    plan = tiny_plan(config)
    student, teacher = build_pair(config, plan)
    gather = Gathering(student)
    initial = gather(student.master)
    exact = {name: weight.double() for name, weight in initial.items()}
    naive = {name: weight.bfloat16() for name, weight in initial.items()}
    unequal_steps = []
    for step in range(STEPS):
        take_step(student, teacher, config, plan, step)
        for name, weight in gather(student.master).items():
            exact[name].lerp_(weight.double(), 1 - MOMENTUM)
            naive[name].lerp_(weight.bfloat16(), 1 - MOMENTUM)
        ema, forward = gather(teacher.ema), dict(teacher.plain_network().named_parameters())
        equal = [
            torch.equal(forward[name], weight.to(student.compute_dtype))
            for name, weight in ema.items()
        ]
        if not all(equal) or ema.keys() != forward.keys():
            unequal_steps.append(step)
    return {
        "student_moved": distance(gather(student.master), initial),
        "moved": distance(exact, initial),
        "size": distance(exact, {name: torch.zeros_like(w) for name, w in exact.items()}),
        "error": distance(ema, exact),
        "naive_error": distance(naive, exact),
        "unequal_steps": unequal_steps,
        "targets_error": _targets_error(teacher, ema, config, plan),
    }


def _targets_error(teacher: Any, ema: dict[str, Tensor], config: Any, plan: Any) -> float:
    """Largest difference of the teacher's targets from those of an ordinary network."""
    from dinoscale.engine.build import build_networks
    from dinoscale.losses.centering import teacher_probs

    dtype = getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[config.engine.precision])
    network = build_networks(config)[1]
    network.load_state_dict(ema)
    network.to(dtype)
    batch = micro_batches(config, plan, 0)[0]
    crops = batch.global_crops
    with torch.no_grad():
        logits = network([crops.flatten(0, 1).to(dtype)], None).unflatten(0, crops.shape[:2])
    expected = teacher_probs(logits, teacher.center, temp=0.1)
    return float(
        (teacher.targets(batch, temp=0.1, gram_counts=True).class_probs - expected).abs().max()
    )


@pytest.fixture(scope="module")
def followed() -> dict[tuple[int, str], dict[str, Any]]:
    """(stage, precision) -> what rank 0 measured; one launch for all."""
    keys = [(stage, precision) for precision in PRECISIONS for stage in STAGES]
    per_rank = run_distributed(
        "tests.distributed.test_ema:follow_student",
        world_size=2,
        timeout_s=580,
        runs=[{"stage": stage, "precision": precision} for stage, precision in keys],
    )
    return dict(zip(keys, per_rank[0], strict=True))


every_run = pytest.mark.parametrize(
    ("stage", "precision"), [(stage, precision) for precision in PRECISIONS for stage in STAGES]
)


@every_run
def test_average_follows_the_student_as_in_float64(
    followed: dict[tuple[int, str], dict[str, Any]], stage: int, precision: str
) -> None:
    run = followed[stage, precision]
    assert run["student_moved"] > 0.1 * run["size"]  # else there is nothing to follow
    bound = STEPS * ROUNDING_OF_A_STEP * run["size"]
    assert run["error"] < bound < 0.01 * run["moved"]


@every_run
def test_average_in_bf16_would_not_follow(
    followed: dict[tuple[int, str], dict[str, Any]], stage: int, precision: str
) -> None:
    run = followed[stage, precision]
    assert run["naive_error"] > 0.5 * run["moved"]


@every_run
def test_forward_uses_the_cast_average_after_every_step(
    followed: dict[tuple[int, str], dict[str, Any]], stage: int, precision: str
) -> None:
    run = followed[stage, precision]
    assert run["unequal_steps"] == []
    assert run["targets_error"] == 0


class Recorder(TorchDispatchMode):
    """Lists the operators run under it that average or communicate, with their elements."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::") or "lerp" in name:
            tensors = next(arg for arg in args if isinstance(arg, (Tensor, Sequence)))
            whole = [tensors] if isinstance(tensors, Tensor) else tensors
            self.calls.append((name, sum(tensor.numel() for tensor in whole)))
        return func(*args, **(kwargs or {}))


def watch_updates(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On every rank: what one update of the teacher does, and what the teacher holds."""
    return [_watch_update(**run) for run in runs]


def _watch_update(stage: int, precision: str) -> dict[str, Any]:
    from dinoscale.engine.build import build_networks
    from dinoscale.engine.student import Student, gather_whole_blocks
    from dinoscale.engine.teacher import Teacher

    config = tiny_config(
        model={"embed_dim": 60}, engine={"zero_stage": stage, "precision": precision}
    )
    plan = tiny_plan(config)
    networks = build_networks(config)
    if stage == 3:
        gather_whole_blocks(*networks)
    student = Student(networks[0], config, plan)
    sizes = [parameter.numel() for parameter in networks[1].parameters()]
    before = _live_storages()  # kept, so that no address of theirs is given out again
    for parameter in networks[1].parameters():  # which the teacher takes over
        before.pop(parameter.untyped_storage().data_ptr(), None)
    teacher = Teacher(networks[1], student, config, plan)
    del networks, parameter
    held = sum(
        storage.nbytes() for address, storage in _live_storages().items() if address not in before
    )
    take_step(student, teacher, config, plan, 0)
    batches = micro_batches(config, plan, 1)
    teacher.begin(batches, temp=0.1)
    teacher.targets(batches[0], temp=0.1, gram_counts=True)
    with Recorder() as recorder:
        teacher.update(student, step=0, momentum=0.9, skipped=torch.tensor(False))
    return {
        "calls": recorder.calls,
        "shard": sum(len(part) for part in teacher.ema),
        "shard_sizes": list(teacher.layout.shard_sizes),
        "prototypes": config.head.num_prototypes,
        "parameter_sizes": sizes,
        "num_bytes": teacher.num_bytes(),
        "held": held,
    }


def _live_storages() -> dict[int, UntypedStorage]:
    """The storages of all tensors that Python objects refer to, by address."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if isinstance(thing, Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors if not tensor.is_meta)
    return {storage.data_ptr(): storage for storage in storages}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_update_sends_the_cast_average_once_and_holds_what_is_documented(world_size: int) -> None:
    precisions = ("bf16", "fp32") if world_size == 2 else ("bf16",)
    runs = [{"stage": s, "precision": precision} for precision in precisions for s in STAGES]
    per_rank = run_distributed(
        "tests.distributed.test_ema:watch_updates",
        world_size=world_size,
        timeout_s=580,
        runs=runs,
    )
    for run, of_ranks in zip(runs, zip(*per_rank, strict=True), strict=True):
        parameters = sum(of_ranks[0]["parameter_sizes"])
        assert sum(result["shard"] for result in of_ranks) == parameters, run
        for result in of_ranks:
            _require_one_lerp_and_one_publication(result, run["stage"], world_size)
            _require_documented_bytes(result, run, world_size)


def _require_one_lerp_and_one_publication(
    result: dict[str, Any], stage: int, world_size: int
) -> None:
    """The average itself sends nothing; then one all-gather a group, none at stage 3."""
    averaged = sum(result["shard_sizes"]) if stage else result["shard"]  # flat, padding included
    expected = [("aten::_foreach_lerp_", averaged)]
    if world_size > 1:
        expected.append(("c10d::allreduce_", 2 * result["prototypes"]))  # center, mean target
    if world_size > 1 and stage < 3:
        expected += [
            ("c10d::_allgather_base_", world_size * size) for size in result["shard_sizes"]
        ]
    assert result["calls"] == expected, stage


def _require_documented_bytes(result: dict[str, Any], run: dict[str, Any], world_size: int) -> None:
    """4 P / W + s P at stages 0-2, (4 + s) P / W at stage 3, and padding; docstring of teacher."""
    size = {"bf16": 2, "fp32": 4}[run["precision"]]
    parameters, groups = sum(result["parameter_sizes"]), len(result["shard_sizes"])
    if run["stage"] < 3:
        documented = 4 * parameters / world_size + size * parameters
        padding = groups * 2 * (4 + size * world_size)  # to a multiple of at most 2 W elements
    else:
        documented = (4 + size) * parameters / world_size
        padding = len(result["parameter_sizes"]) * (4 + size)
    assert documented <= result["num_bytes"] <= documented + padding, run
    center = 4 * 4 * result["prototypes"]  # and the mean target, and the sums for the next ones
    assert 0 <= result["held"] - result["num_bytes"] <= center + 512, run
