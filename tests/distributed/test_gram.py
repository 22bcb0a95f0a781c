"""The Gram network in a run: its loss at every stage, its refreshes, and what a resume restores.

The literal step of DINOv2 with a literal Gram term is the reference. Its float32 shows what
rounding does to the numbers.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.config import RunConfig, resolve
from dinoscale.engine.schedules import StepValues
from tests.distributed.plain_run import EPS, NUMBERS, largest_relative
from tests.distributed.tiny_run import (
    STEPS_PER_EPOCH,
    Gathering,
    dinov2,
    micro_batches,
    tiny_config,
    tiny_plan,
)
from tests.harness import run_distributed
from tests.reference_dinov2 import ReferenceStep, Share, weights_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

RANKS, STEPS = 2, 8
FIRST, SAVED, LAST = 2, 5, 8  # steps done at the checkpoints: before any refresh, amid, after them
REFRESHES = [None, None, None, 1, 1, 2, 2, 2]  # after each step
REFRESHED = (4, 6)  # steps done
BAD = 5  # zero-based, with a refresh due: its images are bad, so that it is skipped
OFF = 6  # zero-based, amid others: the loss has no weight
WEIGHT = 2.0
JOBS = ["0_fp32", "1_fp32", "2_fp32", "3_fp32", "3_bf16"]  # stage and precision
ELASTIC = {"2_fp32": "3_fp32", "3_fp32": "0_fp32"}  # to one rank
BACKBONE = "backbone."


def _config(job: str) -> RunConfig:
    stage, precision = job.split("_")
    sections = dinov2(
        "sinkhorn_knopp",
        patch_head=True,
        model={"layer_scale": 1.0},
        gram={
            "loss_weight": WEIGHT,
            "refresh_every_steps": 2,
            "first_refresh_step": 3,  # so once 4 and 6 steps are done
            "max_refreshes": 2,
            "crop_size": 64,
        },
        engine={"zero_stage": int(stage), "precision": precision},
        optim={"lr": 0.02, "warmup_epochs": 0, "clip_mode": "per_network"},
    )
    sections["dino"] |= {"freeze_last_layer_by": "zero_rate", "freeze_last_layer_epochs": 0}
    sections["head"] = {"norm_last_layer": False}
    sections["patch_head"] |= {"norm_last_layer": False}
    return tiny_config(**sections)


class LiteralGram(ReferenceStep):
    """The literal step, and a Gram network as the paper has it."""

    def __init__(self, config: RunConfig, dtype: torch.dtype) -> None:
        from dinoscale.engine.build import build_networks

        weights = weights_of(build_networks(config)[0].state_dict(), config)
        weights = {name: value.to(dtype) for name, value in weights.items()}
        super().__init__(config, torch.device("cpu"), weights)
        self.gram: Any = None
        self.crops: list[Tensor] = []  # of each rank, for the next step

    def __call__(self, shares: Sequence[Share], now: StepValues) -> dict[str, float]:
        self._gram_weight = WEIGHT * now.gram_weight
        logged = {} if now.step == BAD else super().__call__(shares, now)
        if now.step + 1 in REFRESHED:
            self.gram = copy.deepcopy(self.teacher.backbone)
        return logged

    def _losses(self, share: Share, *targets: Tensor) -> dict[str, Tensor]:
        losses = super()._losses(share, *targets)
        images, crops = share.global_crops.flatten(0, 1), self.crops.pop(0).flatten(0, 1)
        losses["gram_loss"] = losses["ibot_loss"].new_zeros(())
        if self.gram is not None and self._gram_weight:
            _, patches = self.student.backbone(images, share.masks.flatten(0, 1))
            with torch.no_grad():
                _, targets_ = self.gram(crops)
            per_image = []
            for x, y in zip(patches, targets_, strict=True):
                grid = y.T.reshape(1, -1, 8, 8)  # 64 px in patches of 8, against 32 px
                y = F.interpolate(grid, size=(4, 4), mode="bicubic").flatten(2)[0].T
                x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
                per_image.append((x @ x.T - y @ y.T).square().mean())
            losses["gram_loss"] = torch.stack(per_image).mean()
        return losses

    def _total(self, losses: Any) -> Tensor:
        return super()._total(losses) + self._gram_weight * losses["gram_loss"]


def _values(config: RunConfig, plan: Any, step: int) -> StepValues:
    from dinoscale.engine.build import schedules_of

    now = schedules_of(config, plan).at(step)
    return dataclasses.replace(now, gram_weight=0.0) if step == OFF else now


@functools.cache
def literally(dtype: torch.dtype) -> dict[str, list[float]]:
    """Losses, Gram losses and norms of the backbone's gradient of each step but the bad one."""
    config = _config("0_fp32")
    train = config.train.model_copy(update={"micro_batch_size": config.train.batch_size})
    whole = config.model_copy(update={"train": train})
    plan = resolve(whole, world_size=1, num_images=config.train.batch_size * STEPS_PER_EPOCH)
    step = LiteralGram(config, dtype)
    found: dict[str, list[float]] = {"loss": [], "gram_loss": [], "norm": []}
    for number in range(STEPS):
        (batch,) = micro_batches(whole, plan, number)
        masks = batch.masks.masks.unflatten(0, (2, -1))
        views = [v.to(dtype) for v in (batch.global_crops, batch.local_crops, batch.gram_crops)]
        of_ranks = [
            [x.chunk(RANKS, dim=1)[rank] for x in (*views[:2], masks)] for rank in range(RANKS)
        ]
        step.crops = list(views[2].chunk(RANKS, dim=1))
        logged = step([Share(*parts) for parts in of_ranks], _values(whole, plan, number))
        if number == BAD:
            continue
        total = step._total({name: torch.tensor(x) for name, x in logged.items()})
        found["loss"].append(float(total))
        found["gram_loss"].append(logged["gram_loss"])
        squares = [n**2 for k, n in step.grad_norms.items() if k.startswith(BACKBONE)]
        found["norm"].append(sum(squares) ** 0.5)
    return found


def follow(root: str) -> dict[str, Any]:
    """On every rank: take the steps of each job, resume them, and begin with given weights."""
    return {job: _follow(job, Path(root) / job) for job in JOBS}


def _follow(job: str, run_dir: Path) -> dict[str, Any]:
    from dinoscale.engine.build import build_pair

    config = _config(job)
    plan = tiny_plan(config)
    pair = build_pair(config, plan)
    gather = Gathering(pair[0])
    found = _steps(pair, config, plan, gather, range(STEPS), run_dir)
    gram = pair[1].gram
    parameters = list(gram.backbone.network.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in parameters)
    assert not gram.backbone.network.training
    found["rolled_back"] = []
    for step in (SAVED, FIRST):
        _restore(run_dir, step, pair)
        found["rolled_back"].append(_weights(gather, pair))
    given = {
        name.removeprefix(BACKBONE): torch.full(shape, 0.25)
        for name, shape in pair[0].shapes.items()
        if name.startswith(BACKBONE)
    }
    gram.load(given)
    found["given"] = _weights(gather, pair)
    _restore(run_dir, FIRST, pair)  # without a Gram network: the given weights stay
    assert gram.refreshes == 0
    anew = build_pair(config, plan)
    _restore(run_dir, SAVED, anew)
    found["resumed"] = _steps(anew, config, plan, gather, range(SAVED, STEPS), None)
    for student, teacher in (pair, anew):
        teacher.wait()
        student.close()
    return found


def _steps(
    pair: Any, config: RunConfig, plan: Any, gather: Gathering, steps: range, run_dir: Path | None
) -> dict[str, Any]:
    from dinoscale.engine.build import loss_weights_of
    from dinoscale.engine.step import train_step
    from tests.golden.test_trajectory import save

    keys = ("loss", "gram_loss", "norm", "refreshes", "ran", "ema", "gram")
    found: dict[str, list[Any]] = {key: [] for key in keys}
    weights, ran = loss_weights_of(config), []
    pair[1].gram.backbone.network.register_forward_hook(lambda *_: ran.append(step))
    for step in steps:
        now, batches = _values(config, plan, step), micro_batches(config, plan, step)
        if step == BAD:
            batches[0].global_crops[0, 0, 0, 0, 0] = torch.nan
        result = train_step(batches, *pair, now, loss_weights=weights)
        assert bool(result.skipped) == (step == BAD)
        if step != BAD:
            found["loss"].append(result.loss)
            found["gram_loss"].append(result.terms["gram_loss"])
            found["norm"].append(pair[0].network_grad_norms()["backbone"])
        found["refreshes"].append(pair[1].gram.refreshes)
        found["ran"].append(ran.count(step))
        found["ema"].append(gather(pair[1].ema))
        found["gram"].append(_weights(gather, pair))
        if run_dir is not None and step + 1 in (FIRST, SAVED, LAST):
            save(str(run_dir / str(step + 1)), *pair, step=step + 1)
    return found


def _restore(run_dir: Path, step: int, pair: Any) -> None:
    from tests.golden.test_trajectory import resume

    resume(str(run_dir / str(step)), *pair, step=step)


def _weights(gather: Gathering, pair: Any) -> dict[str, Tensor]:
    """The Gram network's tensors in full; empty while there are none."""
    student, teacher = pair
    if teacher.gram.refreshes is None:
        return {}
    parts = zip(student.layout.fragments, teacher.gram.backbone.own, strict=True)
    whole = gather([torch.zeros(f.numel) if v is None else v.float() for f, v in parts])
    return {name: value for name, value in whole.items() if name.startswith(BACKBONE)}


def move(root: str) -> dict[str, dict[str, Tensor]]:
    """On one rank: the Gram network from checkpoints of two ranks and another stage."""
    from dinoscale.engine.build import build_pair

    found = {}
    for job, other in ELASTIC.items():
        config = _config(other)
        pair = build_pair(config, tiny_plan(config))
        _restore(Path(root) / job, SAVED, pair)
        found[job] = _weights(Gathering(pair[0]), pair)
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_computes_the_literal_loss_and_its_gradient(
    followed: dict[str, dict[str, Any]], stage: int
) -> None:
    exact, rounded = (literally(dtype) for dtype in (torch.float64, torch.float32))
    found = followed[f"{stage}_fp32"]
    without = [False, False, False, False, True, False, True]  # no network, a loss, its weight 0
    assert [loss > 0 for loss in exact["gram_loss"]] == without
    assert [loss > 0 for loss in found["gram_loss"]] == without
    for name in ("loss", "gram_loss", "norm"):
        here, wanted, off = (
            [x for x in of[name] if x or name != "gram_loss"] for of in (found, exact, rounded)
        )
        bound = NUMBERS * (largest_relative(off, wanted) + EPS)
        assert here == pytest.approx(wanted, rel=bound), name


@pytest.mark.parametrize("job", JOBS)
def test_the_network_runs_in_steps_only_in_which_its_loss_has_a_weight(
    followed: dict[str, dict[str, Any]], job: str
) -> None:
    assert followed[job]["ran"] == [0, 0, 0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("job", JOBS)
def test_the_average_is_taken_over_when_due_and_only_then(
    followed: dict[str, dict[str, Any]], job: str
) -> None:
    found = followed[job]
    assert found["refreshes"] == REFRESHES
    taken: dict[str, Tensor] = {}
    for step in range(STEPS):
        if step + 1 in REFRESHED:
            ema = found["ema"][step]
            taken = {name: value for name, value in ema.items() if name.startswith(BACKBONE)}
            if job.endswith("bf16"):
                taken = {name: value.bfloat16().float() for name, value in taken.items()}
        _require_equal(found["gram"][step], taken)
    assert not torch.equal(found["gram"][3]["backbone.norm.bias"], taken["backbone.norm.bias"])


@pytest.mark.parametrize("job", JOBS)
def test_a_resume_across_a_refresh_changes_no_bit(
    followed: dict[str, dict[str, Any]], job: str
) -> None:
    found = followed[job]
    for name in ("loss", "gram_loss", "norm", "refreshes", "ran"):
        resumed = found["resumed"][name]
        assert resumed == found[name][-len(resumed) :], name
    for mine, whole in zip(found["resumed"]["gram"], found["gram"][SAVED:], strict=True):
        _require_equal(mine, whole)


@pytest.mark.parametrize("job", JOBS)
def test_a_rollback_brings_the_weights_back_or_forgets_them(
    followed: dict[str, dict[str, Any]], job: str
) -> None:
    found = followed[job]
    amid, before = found["rolled_back"]
    _require_equal(amid, found["gram"][SAVED - 1])
    assert before == {}
    assert found["given"].keys() == amid.keys()
    assert all((value == 0.25).all() for value in found["given"].values())


def test_other_ranks_and_stages_load_the_same_weights(
    root: Path, followed: dict[str, dict[str, Any]]
) -> None:
    (moved,) = run_distributed(
        "tests.distributed.test_gram:move", world_size=1, timeout_s=300, root=str(root)
    )
    for job in ELASTIC:
        _require_equal(moved[job], followed[job]["gram"][SAVED - 1])


def _require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
