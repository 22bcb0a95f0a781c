"""Compiled and checkpointed blocks take the same steps as plain ones, at every ZeRO stage."""

from typing import Any, NamedTuple

import pytest
import torch
import torch._inductor.config

from dinoscale.config import RunConfig
from tests.distributed.plain_run import Plain, train_plainly
from tests.distributed.tiny_run import Gathering, take_step, tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, DEPTH = 3, 5


class Job(NamedTuple):
    stage: int
    compiled: bool = False
    every: int = 0
    recompute: str = "block"
    precision: str = "fp32"
    subset: bool = False  # drop branches without computing them


ATTENDED = "all_but_attention"
JOBS = [
    *(Job(stage) for stage in (0, 2, 3)),
    *(Job(stage, every=2) for stage in (0, 3)),
    *(Job(stage, every=2, recompute=ATTENDED) for stage in (2, 3)),
    *(Job(3, precision="bf16", every=every) for every in (0, 1)),
    Job(3, precision="bf16", every=1, recompute=ATTENDED),
    *(Job(stage, subset=True) for stage in (0, 3)),
    Job(3, every=1, recompute=ATTENDED, subset=True),
    Job(2, compiled=True, every=2, recompute="pointwise"),  # at stage 0: golden/test_trajectory.py
    Job(3, compiled=True, every=1),
    Job(3, compiled=True, subset=True),
]


def train_jobs(jobs: list[Any]) -> list[dict[str, Any]]:
    """On every rank: the results of each of `jobs`, and the compiler's counters."""
    inductor = torch._inductor.config
    inductor.compile_threads = 1  # else each rank starts a pool of processes that import torch
    inductor.cpp.vec_isa_ok = False  # plain loops, which g++ compiles faster than vectors
    return [_train(Job(*job)) for job in jobs]


def _config(job: Job) -> RunConfig:
    model: dict[str, Any] = {"depth": DEPTH}
    if job.subset:
        model |= {"drop_path_mode": "subset", "drop_path_rate": 0.5}
    return tiny_config(
        model=model,
        optim={"name": "sgd", "lr": 0.05, "warmup_epochs": 0},
        engine={
            "zero_stage": job.stage,
            "precision": job.precision,
            "compile": job.compiled,
            "checkpoint_every_k_blocks": job.every,
            "recompute": job.recompute,
        },
    )


def _train(job: Job) -> dict[str, Any]:
    from dinoscale.engine.build import build_pair

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = _config(job)
    plan = tiny_plan(config)
    student, teacher = build_pair(config, plan)
    gather = Gathering(student)
    initial = gather(student.master)
    losses = [take_step(student, teacher, config, plan, step) for step in range(STEPS)]
    counted = torch._dynamo.utils.counters
    return {
        "losses": losses,
        "initial": {"student": initial, "teacher": initial},
        "student": gather(student.master),
        "teacher": gather(teacher.ema),
        "graphs": counted["stats"]["unique_graphs"],
        "breaks": sum(counted["graph_break"].values()),
    }


@pytest.fixture(scope="module")
def trained() -> dict[Job, dict[str, Any]]:
    """What rank 0 returned for each of `JOBS`; one launch for all."""
    function = "tests.distributed.test_compiled:train_jobs"
    jobs = [tuple(job) for job in JOBS]
    per_rank = run_distributed(function, world_size=2, timeout_s=580, jobs=jobs)
    return dict(zip(JOBS, per_rank[0], strict=True))


@pytest.mark.parametrize("job", [job for job in JOBS if job.every and not job.compiled], ids=str)
def test_activation_checkpointing_changes_no_bit(
    trained: dict[Job, dict[str, Any]], job: Job
) -> None:
    run, plain = trained[job], trained[Job(job.stage, precision=job.precision, subset=job.subset)]
    assert run["losses"] == plain["losses"]
    for which in ("student", "teacher"):
        different = [k for k, v in run[which].items() if not torch.equal(v, plain[which][k])]
        assert different == [], which


@pytest.fixture(scope="module")
def plain() -> Plain:
    """All branches kept; dropping some rounds no more."""
    return train_plainly(_config(Job(0)), steps=STEPS)


@pytest.mark.parametrize("job", [job for job in JOBS if job.compiled], ids=str)
def test_compiled_blocks_take_the_same_steps(
    trained: dict[Job, dict[str, Any]], plain: Plain, job: Job
) -> None:
    plain.require(trained[job], reference=trained[Job(job.stage, subset=job.subset)])


def test_subsets_are_the_same_at_stage_3_and_change_the_numbers(
    trained: dict[Job, dict[str, Any]], plain: Plain
) -> None:
    plain.require(trained[Job(3, subset=True)], reference=trained[Job(0, subset=True)])
    with pytest.raises(AssertionError):
        plain.require(trained[Job(3, subset=True)], reference=trained[Job(3)])


@pytest.mark.parametrize("job", [job for job in JOBS if job.compiled], ids=str)
def test_all_blocks_share_their_graphs(trained: dict[Job, dict[str, Any]], job: Job) -> None:
    student = 2 if 1 < job.every < DEPTH else 1
    assert trained[job]["breaks"] == 0
    if job.subset:  # nothing dropped, the first sizes, sizes as variables
        assert trained[job]["graphs"] <= 3 + 1
    else:
        assert trained[job]["graphs"] == student + 1  # and the teacher's
