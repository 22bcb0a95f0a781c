"""Features of a frozen teacher without heads: over ranks and micro-batches, and in a resumed run.

The reference is a plain loop in torch over the same crops. Its float32 shows what rounding does to
the numbers. The teacher is deeper and wider than the student, with another grid of patches.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.checkpoint.load import open_run
from dinoscale.config import RunConfig, RunPlan, resolve
from dinoscale.convert.source import read_source
from tests.distributed.plain_run import EPS, NUMBERS, largest_relative
from tests.distributed.tiny_run import (
    STEPS_PER_EPOCH,
    Gathering,
    dinov2,
    micro_batches,
    tiny_config,
    tiny_plan,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(180)]

STEPS, SAVED = 3, 1
CLASS, PATCH = 1.5, 0.5
TERMS = ("class_feature_loss", "patch_feature_loss")
TEACHER = {
    "backbone": "vit_tiny_patch16_224",
    "patch_size": 4,
    "embed_dim": 28,
    "depth": 3,
    "num_heads": 4,
}
CONVNETS = {"convnext": "convnext_atto", "resnet": "resnet18"}
# Loss, stage and images of a micro-batch; beside DINO and iBOT, or alone, also of a ConvNeXt, and
# of a ResNet, which has buffers.
JOBS = {
    "alone_0": ("smooth_l1", 0, 3),
    "alone_3": ("smooth_l1", 3, 1),
    "beside_0": ("cosine", 0, 3),
    "beside_3": ("cosine", 3, 1),
    "convnext_0": ("cosine", 0, 3),
    "convnext_3": ("cosine", 3, 1),
    "resnet_0": ("cosine", 0, 3),
    "resnet_3": ("cosine", 3, 1),
}
RESUMED = ("alone_3",)
BACKBONE = "backbone."


def _config(job: str) -> RunConfig:
    kind, stage, images = JOBS[job]
    convnet = CONVNETS.get(job.partition("_")[0])
    changes: dict[str, Any] = {
        "distill": {
            "teacher": "given",
            "model": TEACHER if convnet is None else {"backbone": convnet},
            "class_feature_weight": CLASS,
            "patch_feature_weight": PATCH,
            "feature_loss": kind,
        },
        "train": {"micro_batch_size": images},
        "engine": {"zero_stage": stage, "precision": "fp32"},
        "optim": {"lr": 0.02, "clip_grad": 0.0},
    }
    if not job.startswith("beside"):
        crops = {"global_size": 32, "num_local": 0}
        return tiny_config(**changes, crops=crops, dino={"loss_weight": 0.0, "momentum": 0.5})
    sections = dinov2("centering", patch_head=True, **changes)
    sections["koleo"] = {"loss_weight": 0.0}
    sections["ibot"] |= {"mask_rule": "dinov3"}  # as many patches in each image
    return tiny_config(**sections)


def _teacher(config: RunConfig) -> dict[str, Tensor]:
    """Weights of the teacher by name, the same in every process."""
    from dinoscale.engine.build import shapes_only

    generator = torch.Generator().manual_seed(7)
    shapes = shapes_only(config.of_teacher).backbone.state_dict()
    weights = {}
    for name, value in shapes.items():
        drawn = 0.3 * torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            drawn = 0.5 + drawn.abs()
        weights[f"{BACKBONE}{name}"] = drawn.to(value.dtype)  # a batch norm counts its batches
    return weights


def _of_one_pass(job: str) -> tuple[RunConfig, RunPlan]:
    """Configuration and plan of a job whose steps are a single micro-batch."""
    config = _config(job)
    train = config.train.model_copy(update={"micro_batch_size": config.train.batch_size})
    config = config.model_copy(update={"train": train})
    images = config.train.batch_size * STEPS_PER_EPOCH
    return config, resolve(config, world_size=1, num_images=images)


def _network_of(config: RunConfig, dtype: torch.dtype) -> Any:
    """The teacher's backbone."""
    from dinoscale.engine.build import shapes_only

    teacher = shapes_only(config.of_teacher).backbone
    state = {name.removeprefix(BACKBONE): v.to(dtype) for name, v in _teacher(config).items()}
    teacher.load_state_dict(state, assign=True)
    return teacher.eval()


@torch.no_grad()
def _targets(teacher: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Its features of classes, and of patches on the student's grid."""
    classes, patches = teacher([images], all_patches=True)
    grid = patches.mT.unflatten(2, (8, 8))
    coarse = F.interpolate(grid, size=(4, 4), mode="bilinear", antialias=True)
    return classes, coarse.flatten(2).mT


@torch.no_grad()
def _first_beside(dtype: torch.dtype) -> list[float]:
    """Both terms beside DINO and iBOT at the first step: 1 - cosine, of crops without a mask."""
    from dinoscale.engine.build import build_networks

    config, plan = _of_one_pass("beside_0")
    student = build_networks(config)[0].to(dtype)
    (batch,) = micro_batches(config, plan, 0)
    whole = ~batch.masks.masks.flatten(1).any(1)
    assert 2 * int(whole.sum()) == len(whole)  # and in any micro-batch
    images = batch.global_crops.flatten(0, 1)[whole].to(dtype)
    own = student.backbone([images], all_patches=True)
    terms = []
    maps = student.class_map, student.patch_map
    targets = _targets(_network_of(config, dtype), images)
    for tokens, mapped, target in zip(own, maps, targets, strict=True):
        assert mapped is not None
        found = tokens @ mapped.weight.T + mapped.bias
        product = (found * target).sum(-1) / found.norm(dim=-1) / target.norm(dim=-1)
        terms.append(float(1 - product.mean()))
    return terms


@functools.cache
def literally(dtype: torch.dtype) -> dict[str, Any]:
    """Features alone, in one process: losses of each step, both networks at the end."""
    from dinoscale.engine.build import build_networks, schedules_of
    from dinoscale.engine.param_groups import NO_DECAY, build_optimizer

    config, plan = _of_one_pass("alone_0")
    student, average = (network.to(dtype) for network in build_networks(config))
    average.load_state_dict(student.state_dict())
    teacher = _network_of(config, dtype)
    optimizer = build_optimizer("adamw", student)
    found: dict[str, Any] = {name: [] for name in ("loss", *TERMS)}
    for step in range(STEPS):
        now = schedules_of(config, plan).at(step)
        (batch,) = micro_batches(config, plan, step)
        images = batch.global_crops.flatten(0, 1).to(dtype)
        targets = _targets(teacher, images)
        tokens = student.backbone([images], all_patches=True)
        losses = []
        for own, target, mapped in zip(
            tokens, targets, (student.class_map, student.patch_map), strict=True
        ):
            z = target - target.mean(-1, keepdim=True)
            z = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            error = (own @ mapped.weight.T + mapped.bias - z).abs()
            losses.append(torch.where(error < 1, error**2 / 2, error - 0.5).mean())
        loss = CLASS * losses[0] + PATCH * losses[1]
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = now.lr
            group["weight_decay"] = 0.0 if group["name"] == NO_DECAY else now.weight_decay
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), student.parameters(), strict=True):
                mean.lerp_(weight, 1 - now.momentum)
        for name, value in zip(found, (loss, *losses), strict=True):
            found[name].append(float(value.detach()))
    return found | {
        "student": dict(student.named_parameters()),
        "ema": dict(average.named_parameters()),
    }


def follow(root: str) -> dict[str, Any]:
    """On every rank: take the steps of each job, and resume them."""
    found = {job: _follow(job, Path(root) / job) for job in JOBS}
    return found | {"whole_run": _train(Path(root))}


def _train(root: Path) -> list[str]:
    """A run of features alone, stopped and resumed, then with another teacher; how each ended."""
    import os

    from dinoscale.convert.run_checkpoint import card_of
    from dinoscale.convert.weights_file import save_backbone
    from dinoscale.errors import ConfigError
    from dinoscale.runtime import distributed
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.trainer import train

    config, ends = _config("alone_0"), []
    files = [root / name for name in ("teacher.safetensors", "other.safetensors")]
    if distributed.rank() == 0:
        card = card_of(config.of_teacher, source="drawn")
        state = {name.removeprefix(BACKBONE): v for name, v in _teacher(config).items()}
        save_backbone(files[0], state, card)
        save_backbone(files[1], state | {"norm.bias": state["norm.bias"] + 1}, card)
    distributed.gather_objects(None)
    for file, stop in ((files[0], 1), (files[0], 2), (files[1], 3)):
        changes = {
            "distill": config.distill.model_copy(update={"teacher": str(file)}),
            "train": config.train.model_copy(update={"stop_after_steps": stop, "epochs": 2}),
            "data": config.data.model_copy(
                update={"train": "synthetic:shapes?images=12&size=32", "num_workers": 0}
            ),
            "run_dir": str(root / "run"),
        }
        try:
            train(config.model_copy(update=changes), read_process(os.environ))
            ends.append("done")
        except ConfigError as error:
            ends.append(str(error))
    return ends


def _follow(job: str, run_dir: Path) -> dict[str, Any]:
    from dinoscale.engine.build import build_pair
    from dinoscale.runtime import distributed
    from tests.golden.test_trajectory import resume

    config = _config(job)
    plan = tiny_plan(config)
    weights = _teacher(config) if distributed.rank() == 0 else None
    pair = build_pair(config, plan)
    pair[1].frozen.load(weights, identity="given")
    gather = Gathering(pair[0])
    found = _steps(pair, config, plan, range(STEPS), run_dir)
    found |= {"student": gather(pair[0].master), "ema": gather(pair[1].ema)}
    pairs = [pair]
    if job in RESUMED:
        anew = build_pair(config, plan, values=False)
        anew[1].frozen.load(weights, identity="given")
        resume(str(run_dir), *anew, step=SAVED)
        found["resumed"] = _steps(anew, config, plan, range(SAVED, STEPS), None)
        found["same"] = all(map(torch.equal, pair[0].master, anew[0].master))
        pairs.append(anew)
    for student, teacher in pairs:
        teacher.wait()
        student.close()
    return found


def _steps(
    pair: Any, config: RunConfig, plan: Any, steps: range, run_dir: Path | None
) -> dict[str, Any]:
    from dinoscale.engine.build import loss_weights_of, schedules_of
    from dinoscale.engine.step import train_step
    from tests.golden.test_trajectory import save

    found: dict[str, Any] = {name: [] for name in ("loss", *TERMS)}
    weights = loss_weights_of(config)
    for step in steps:
        now, batches = schedules_of(config, plan).at(step), micro_batches(config, plan, step)
        result = train_step(batches, *pair, now, loss_weights=weights)
        found["loss"].append(result.loss)
        for name in TERMS:
            found[name].append(result.terms[name])
        if run_dir is not None and step + 1 == SAVED:
            save(str(run_dir), *pair, step=SAVED)
    return found


@pytest.mark.parametrize("job", [job for job in JOBS if job.startswith("alone")])
def test_features_alone_are_the_plain_loop_at_any_stage_and_accumulation(
    followed: dict[str, dict[str, Any]], job: str
) -> None:
    exact, rounded = (literally(dtype) for dtype in (torch.float64, torch.float32))
    found = followed[job]
    for name in ("loss", *TERMS):
        bound = NUMBERS * (largest_relative(rounded[name], exact[name]) + EPS)
        assert found[name] == pytest.approx(exact[name], rel=bound), name
    assert found["student"].keys() == exact["student"].keys()  # and so there is no head
    assert {"class_map.weight", "patch_map.bias"} <= found["student"].keys()
    for kind in ("student", "ema"):
        off, wanted = _whole(rounded[kind]), _whole(exact[kind])
        bound = NUMBERS * float((off - wanted).norm() / wanted.norm() + EPS)
        assert float((_whole(found[kind]) - wanted).norm() / wanted.norm()) <= bound


def _whole(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().double().flatten() for name in sorted(tensors)])


def test_beside_the_own_objectives_stages_and_accumulation_agree(
    followed: dict[str, dict[str, Any]],
) -> None:
    whole, sharded = followed["beside_0"], followed["beside_3"]
    assert len(whole["student"]) > len(followed["alone_0"]["student"])  # heads
    # Float32 sums of a few dozen terms in another order, in some layers and steps.
    for name in ("loss", *TERMS):
        assert sharded[name] == pytest.approx(whole[name], rel=1e4 * EPS), name
        assert min(whole[name]) > 0.01, name


@pytest.mark.parametrize("job", [job for job in JOBS if job.startswith("beside")])
def test_beside_the_own_objectives_they_are_the_cosines_of_crops_without_a_mask(
    followed: dict[str, dict[str, Any]], job: str
) -> None:
    exact, rounded = _first_beside(torch.float64), _first_beside(torch.float32)
    bound = NUMBERS * (largest_relative(rounded, exact) + EPS)
    assert [followed[job][name][0] for name in TERMS] == pytest.approx(exact, rel=bound)


@pytest.mark.parametrize("network", CONVNETS)
def test_a_convolutional_network_teaches_at_any_stage(
    followed: dict[str, dict[str, Any]], network: str
) -> None:
    whole, sharded = followed[f"{network}_0"], followed[f"{network}_3"]
    for name in ("loss", *TERMS):
        assert sharded[name] == pytest.approx(whole[name], rel=1e4 * EPS), name
    assert whole["loss"] == sorted(whole["loss"], reverse=True)  # it learns in every step


@pytest.mark.parametrize("job", RESUMED)
def test_a_resumed_run_goes_on_bit_for_bit(followed: dict[str, dict[str, Any]], job: str) -> None:
    found = followed[job]
    for name in ("loss", *TERMS):
        assert found["resumed"][name] == found[name][SAVED:], name
    assert found["same"]


def test_a_whole_run_of_features_alone_resumes_with_the_same_teacher_only(
    root: Path, followed: dict[str, Any]
) -> None:
    *done, another = followed["whole_run"]
    assert done == ["done", "done"]
    assert another.startswith("distill.teacher: the run of ")
    assert "whose weights are others" in another
    checkpoint = open_run(root / "run")
    parts = {name.partition(".")[0] for name in checkpoint.shapes}
    assert parts == {"backbone", "class_map", "patch_map"}  # neither heads nor the teacher
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {key for line in lines for key in line}
    assert set(TERMS) <= logged
    assert not {"kl", "teacher_entropy", "dino_loss", "center_norm"} & logged  # of heads
    exported = read_source(root / "run")
    assert exported.head is None
    assert exported.backbone["cls_token"].shape[-1] == 20
    assert not any("map" in name for name in exported.backbone)
