"""The anchor in a run: its loss over ranks and micro-batches, its weights, a resume.

The literal step of DINOv2 with the anchor's terms is the reference. Its float32 shows what rounding
does to the numbers.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config import RunConfig, resolve
from dinoscale.config.sections.objectives import AnchorConfig
from dinoscale.engine.schedules import StepValues
from tests.distributed.plain_run import EPS, NUMBERS, largest_relative
from tests.distributed.tiny_run import (
    STEPS_PER_EPOCH,
    Gathering,
    dinov2,
    micro_batches,
    take_step,
    tiny_config,
    tiny_plan,
)
from tests.harness import run_distributed
from tests.reference_dinov2 import ReferenceStep, Share, weights_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]

RANKS, STEPS, SAVED = 2, 4, 2
CLASS, PATCH = 1.5, 0.5
AT_START = (100 * EPS) ** 2  # of unit vectors that differ by a rounding in each operation
# In bf16 likewise, with 15 operations of 2 blocks on either side, each of which rounds by half of
# its eps: two vectors are sqrt(30) / 2 = 2.7 eps apart, a third of this. d = |difference|^2 / 2.
AT_START_BF16 = (8 * torch.finfo(torch.bfloat16).eps) ** 2 / 2
TERMS = ("anchor_class_loss", "anchor_patch_loss")
JOBS = ["0_fp32", "2_fp32", "3_fp32", "2_bf16"]  # stage and precision
BACKBONE = "backbone."


def _config(job: str) -> RunConfig:
    stage, precision = job.split("_")
    sections = dinov2(
        "sinkhorn_knopp",
        patch_head=True,
        model={"layer_scale": 1.0},
        anchor={"class_weight": CLASS, "patch_weight": PATCH},
        train={"micro_batch_size": 1, "init_from": "given"},  # three micro-batches
        engine={"zero_stage": int(stage), "precision": precision},
        optim={"lr": 0.02, "warmup_epochs": 0, "clip_mode": "per_network"},
    )
    sections["koleo"] = {"loss_weight": 0.0}
    sections["ibot"] |= {"mask_ratio": (0.3, 0.6)}  # every chosen crop has masked patches
    sections["dino"] |= {"freeze_last_layer_by": "zero_rate", "freeze_last_layer_epochs": 0}
    sections["head"] = {"norm_last_layer": False}
    sections["patch_head"] |= {"norm_last_layer": False}
    return tiny_config(**sections)


class LiteralAnchor(ReferenceStep):
    """The literal step, and the student's features beside those of its copy at the start."""

    def __init__(self, config: RunConfig, dtype: torch.dtype) -> None:
        from dinoscale.engine.build import build_networks

        weights = weights_of(build_networks(config)[0].state_dict(), config)
        weights = {name: value.to(dtype) for name, value in weights.items()}
        super().__init__(config, torch.device("cpu"), weights)
        self.anchor = copy.deepcopy(self.student.backbone).requires_grad_(False)

    def _losses(self, share: Share, *targets: Tensor) -> dict[str, Tensor]:
        losses = super()._losses(share, *targets)
        crops, masks = share.global_crops.flatten(0, 1), share.masks.flatten(0, 1)
        seen = crops[~masks.any(1)]
        pairs = zip(self.student.backbone(seen), self.anchor(seen), strict=True)
        for name, (x, y) in zip(TERMS, pairs, strict=True):
            losses[name] = (1 - torch.cosine_similarity(x, y, dim=-1)).sum() / x[0, ..., :1].numel()
            losses[name] = losses[name] / (len(crops) / 2)  # half of the crops are masked
        return losses

    def _total(self, losses: Any) -> Tensor:
        return super()._total(losses) + CLASS * losses[TERMS[0]] + PATCH * losses[TERMS[1]]


@functools.cache
def literally(dtype: torch.dtype) -> dict[str, list[float]]:
    """Losses, the anchor's terms and norms of the backbone's gradient of each step."""
    config = _config("0_fp32")
    train = config.train.model_copy(update={"micro_batch_size": config.train.batch_size})
    whole = config.model_copy(update={"train": train})
    plan = resolve(whole, world_size=1, num_images=config.train.batch_size * STEPS_PER_EPOCH)
    step = LiteralAnchor(config, dtype)
    found: dict[str, list[float]] = {name: [] for name in ("loss", "norm", *TERMS)}
    for number in range(STEPS):
        (batch,) = micro_batches(whole, plan, number)
        masks = batch.masks.masks.unflatten(0, (2, -1))
        views = [batch.global_crops.to(dtype), batch.local_crops.to(dtype), masks]
        shares = [Share(*(x.chunk(RANKS, dim=1)[rank] for x in views)) for rank in range(RANKS)]
        logged = step(shares, _values(whole, plan, number))
        found["loss"].append(
            float(step._total({name: torch.tensor(x) for name, x in logged.items()}))
        )
        for name in TERMS:
            found[name].append(logged[name])
        squares = [n**2 for k, n in step.grad_norms.items() if k.startswith(BACKBONE)]
        found["norm"].append(sum(squares) ** 0.5)
    return found


def _values(config: RunConfig, plan: Any, step: int) -> StepValues:
    from dinoscale.engine.build import schedules_of

    return schedules_of(config, plan).at(step)


def follow(root: str) -> dict[str, Any]:
    """On every rank: take the steps of each job, and resume them."""
    return {job: _follow(job, Path(root) / job) for job in JOBS}


def _follow(job: str, run_dir: Path) -> dict[str, Any]:
    from dinoscale.engine.build import build_pair
    from tests.golden.test_trajectory import resume

    config = _config(job)
    plan = tiny_plan(config)
    pair = build_pair(config, plan)
    gather = Gathering(pair[0])
    found: dict[str, Any] = {"start": _of_backbone(gather(pair[0].master))}
    found |= _steps(pair, config, plan, range(STEPS), run_dir)
    found["end"] = _weights(gather, pair)
    assert not any(p.requires_grad for p in pair[1].anchor.network.parameters())
    anew = build_pair(config, plan, values=False)
    resume(str(run_dir), *anew, step=SAVED)
    found["restored"] = _weights(gather, anew)
    found["resumed"] = _steps(anew, config, plan, range(SAVED, STEPS), None)
    for student, teacher in (pair, anew):
        teacher.wait()
        student.close()
    return found


def _steps(
    pair: Any, config: RunConfig, plan: Any, steps: range, run_dir: Path | None
) -> dict[str, list[float]]:
    from dinoscale.engine.build import loss_weights_of
    from dinoscale.engine.step import train_step
    from tests.golden.test_trajectory import save

    found: dict[str, list[float]] = {name: [] for name in ("loss", "norm", *TERMS)}
    weights = loss_weights_of(config)
    for step in steps:
        now, batches = _values(config, plan, step), micro_batches(config, plan, step)
        result = train_step(batches, *pair, now, loss_weights=weights)
        found["loss"].append(result.loss)
        found["norm"].append(pair[0].network_grad_norms()["backbone"])
        for name in TERMS:
            found[name].append(result.terms[name])
        if run_dir is not None and step + 1 == SAVED:
            save(str(run_dir), *pair, step=SAVED)
    return found


def _weights(gather: Gathering, pair: Any) -> dict[str, Tensor]:
    """The anchor's tensors in full."""
    student, teacher = pair
    parts = zip(student.layout.fragments, teacher.anchor.own, strict=True)
    whole = gather([torch.zeros(f.numel) if v is None else v.float() for f, v in parts])
    return _of_backbone(whole)


def _of_backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(BACKBONE)}


def move(root: str) -> dict[str, dict[str, Tensor]]:
    """On one rank at stage 3: the anchor from a run of two ranks at stage 2, and from one without.

    Beside the latter the student of that run.
    """
    from dinoscale.engine.build import build_pair
    from tests.golden.test_trajectory import resume, save

    config, other = _config("3_fp32"), Path(root) / "without"
    without = config.model_copy(update={"anchor": AnchorConfig()})
    plan = tiny_plan(config)
    first, pair = build_pair(without, plan), build_pair(config, plan, values=False)
    gather = Gathering(pair[0])
    resume(str(Path(root) / "2_fp32"), *pair, step=SAVED)
    found = {"moved": _weights(gather, pair)}
    take_step(*first, without, plan, 0)
    save(str(other), *first, step=1)
    resume(str(other), *pair, step=1)
    return found | {"begun": _weights(gather, pair), "there": _of_backbone(gather(first[0].master))}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_stage_computes_the_literal_loss_and_its_gradient(
    followed: dict[str, dict[str, Any]], stage: int
) -> None:
    exact, rounded = (literally(dtype) for dtype in (torch.float64, torch.float32))
    found = followed[f"{stage}_fp32"]
    for name in TERMS:
        assert found[name][0] <= AT_START, name
        assert min(found[name][1:]) > 1e4 * AT_START, name
    for name in ("loss", "norm", *TERMS):
        first = int(name in TERMS)
        here, wanted, off = (of[name][first:] for of in (found, exact, rounded))
        bound = NUMBERS * (largest_relative(off, wanted) + EPS)
        assert here == pytest.approx(wanted, rel=bound), name


def test_in_bf16_the_first_terms_are_rounding(followed: dict[str, dict[str, Any]]) -> None:
    found = followed["2_bf16"]
    for name in TERMS:
        assert 0 <= found[name][0] <= AT_START_BF16, name


@pytest.mark.parametrize("job", JOBS)
def test_the_anchor_stays_the_network_of_the_start_also_in_a_resumed_run(
    followed: dict[str, dict[str, Any]], job: str
) -> None:
    found = followed[job]
    start = found["start"]
    if job.endswith("bf16"):
        start = {name: value.bfloat16().float() for name, value in start.items()}
    _require_equal(found["end"], start)
    _require_equal(found["restored"], start)
    for name in ("loss", "norm", *TERMS):
        assert found["resumed"][name] == found[name][SAVED:], name


def test_other_runs_hand_on_their_anchor_else_their_student(
    root: Path, followed: dict[str, dict[str, Any]]
) -> None:
    (found,) = run_distributed(
        "tests.distributed.test_anchor:move", world_size=1, timeout_s=120, root=str(root)
    )
    _require_equal(found["moved"], followed["2_fp32"]["start"])
    _require_equal(found["begun"], found["there"])
    assert not torch.equal(*(found[key]["backbone.norm.bias"] for key in ("moved", "begun")))


def _require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
