"""Settings for many nodes do not change the numbers; 4 ranks are two nodes of two."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinoscale.config import RunConfig, resolve
from dinoscale.engine.model_sizes import dims_of
from dinoscale.planning.plan.communication import transfers
from dinoscale.planning.plan.partition import setup_of
from tests.distributed.plain_run import WEIGHTS, Plain, Rounding, error, train_plainly
from tests.distributed.tiny_run import Gathering, take_step, tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]

STEPS, SAVED, PASSES = 3, 1, 2
LAYERS = {
    "zero_stage": 3,
    "stage3_max_live_parameters": 1,
    "reduce_bucket_size": 4000,
}  # gathered and let go
HPZ = {**LAYERS, "zero_hpz_partition_size": 2}
TOPOLOGIES: dict[str, dict[str, Any]] = {  # hpZ last: DeepSpeed keeps its groups for good
    "2": {"zero_stage": 2},
    "2 small buckets": {"zero_stage": 2, "reduce_bucket_size": 700},
    "2 sums in bf16": {"zero_stage": 2, "communication_dtype": "bf16"},
    "3": LAYERS,
    "3 sums in bf16": {**LAYERS, "communication_dtype": "bf16"},
    "3 hpZ": HPZ,
}

Result = dict[str, Any]


class _Gathers(TorchDispatchMode):
    """Counts the elements that all-gathers make, by the number of ranks that take part."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "c10d::_allgather_base_":
            whole, part = args[:2]
            self.elements[whole.numel() // part.numel()] += whole.numel()
        return func(*args, **(kwargs or {}))


def _config(engine: dict[str, Any]) -> RunConfig:
    return tiny_config(
        train={"batch_size": 4 * 2 * PASSES, "micro_batch_size": 2},
        optim={"lr": 0.05, "warmup_epochs": 0},
        engine={"precision": "fp32", **engine},
    )


def train_all(folder: str) -> dict[str, Result]:
    """On every rank: the steps with each of `TOPOLOGIES`; with hpZ from a checkpoint as well."""
    results = {name: _train(engine, Path(folder) / name) for name, engine in TOPOLOGIES.items()}
    return results | {"resumed": _resume(HPZ, Path(folder) / "3")}


def resume_without(folder: str) -> Result:
    """On every rank: the last steps from the checkpoint that hpZ wrote."""
    return _resume({"zero_stage": 3}, Path(folder) / "3 hpZ")


def _train(engine: dict[str, Any], run_dir: Path) -> Result:
    from dinoscale.engine.build import build_pair

    config = _config(engine)
    pair = build_pair(config, tiny_plan(config))
    initial = Gathering(pair[0])(pair[0].master)
    _take_steps(config, pair, range(SAVED))
    _save(run_dir, *pair)
    begin = {"student": initial, "teacher": initial}
    return {"initial": begin, **_take_steps(config, pair, range(SAVED, STEPS))}


def _resume(engine: dict[str, Any], run_dir: Path) -> Result:
    from dinoscale.engine.build import build_pair
    from dinoscale.training.resume import find_checkpoint, restore

    config = _config(engine)
    pair = build_pair(config, tiny_plan(config))
    checkpoint = find_checkpoint(run_dir)
    assert checkpoint is not None
    restore(checkpoint, *pair)
    return _take_steps(config, pair, range(SAVED, STEPS))


def _take_steps(config: RunConfig, pair: Any, steps: range) -> Result:
    student, teacher = pair
    plan, gather = tiny_plan(config), Gathering(student)
    losses = []
    for step in steps:
        with _Gathers() as recorder:
            losses.append(take_step(student, teacher, config, plan, step))
    average = gather(teacher.ema)
    of_forward = dict(teacher.plain_network().named_parameters())
    return {
        "losses": losses,
        "student": gather(student.master),
        "teacher": average,
        "gathered": recorder.elements,
        "stale": [name for name in average if not torch.equal(average[name], of_forward[name])],
    }


def _save(run_dir: Path, student: Any, teacher: Any) -> None:
    from dinoscale.checkpoint.retention import Keep
    from dinoscale.checkpoint.save import Saver
    from dinoscale.runtime import distributed

    saver = Saver(run_dir, Keep(last=1))
    saver.begin(SAVED, student, teacher, {"config": {}, "plan": {}, "progress": {}})
    result = saver.wait()
    assert result is not None
    assert result.error is None
    distributed.gather_objects(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("topologies"))


@pytest.fixture(scope="module")
def trained(folder: str) -> dict[str, Result]:
    function = "tests.distributed.test_topology:train_all"
    return run_distributed(function, world_size=4, timeout_s=280, folder=folder)[0]


@pytest.fixture(scope="module")
def plain() -> Plain:
    return train_plainly(_config({}), steps=STEPS)


@pytest.mark.parametrize("name", [name for name in TOPOLOGIES if "bf16" not in name])
def test_topology_does_not_change_the_numbers(
    trained: dict[str, Result], plain: Plain, name: str
) -> None:
    plain.require(trained[name], first=SAVED)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_sums_in_bf16_change_them_by_their_rounding(trained: dict[str, Result], stage: str) -> None:
    run = trained[f"{stage} sums in bf16"]
    rounding = Rounding(sums=torch.bfloat16, ranks=4)
    low = train_plainly(_config({}), steps=STEPS, rounding=rounding)
    low.require(run, first=SAVED)
    assert error(run, low.exact) > low.weights / WEIGHTS  # no less either


def test_second_copies_hold_the_same_weights_bit_for_bit(trained: dict[str, Result]) -> None:
    _require_equal(trained["3 hpZ"], trained["3"])
    assert trained["3 hpZ"]["stale"] == []


def test_second_copies_are_of_the_weights_of_the_checkpoint(trained: dict[str, Result]) -> None:
    _require_equal(trained["resumed"], trained["3"])


def _require_equal(run: Result, other: Result) -> None:
    assert run["losses"] == other["losses"]
    for which in ("student", "teacher"):
        different = [k for k, v in run[which].items() if not torch.equal(v, other[which][k])]
        assert different == [], which


@pytest.mark.usefixtures("trained")
def test_a_run_resumes_without_second_copies_on_fewer_ranks(plain: Plain, folder: str) -> None:
    function = "tests.distributed.test_topology:resume_without"
    run = run_distributed(function, world_size=2, timeout_s=280, folder=folder)[0]
    plain.require(run, first=SAVED)


def test_plan_knows_which_gathers_stay_within_a_node(trained: dict[str, Result]) -> None:
    config = _config(HPZ)
    run = resolve(config, world_size=4, num_images=config.train.batch_size)
    planned = {
        transfer.group: transfer.sent_bytes / 4 * transfer.group / (transfer.group - 1)
        for transfer in transfers(dims_of(config), setup_of(config, run, on_gpu=False))
        if transfer.collective == "all-gather"
    }
    # The prototypes are still there when a backward begins.
    planned[2] -= PASSES * config.head.num_prototypes * config.head.bottleneck_dim
    assert trained["3 hpZ"]["gathered"] == pytest.approx(planned, rel=0.02)  # padding
    assert trained["3"]["gathered"] == pytest.approx({4: sum(planned.values())}, rel=0.02)
