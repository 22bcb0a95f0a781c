"""A whole training run under DeepSpeed against the reference's, at every ZeRO stage.

The recorded numbers are float64; the reference itself, in float32, is within 4e-6 (loss) and 5e-4
(every weight tensor of student and teacher, norm of the difference over norm) of them, relative.
Ours rounds in another order at each stage and split, so it may be off by a few times that.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dinoscale.config import RunConfig, parse_config
from dinoscale.config.resolve import resolve
from tests.harness import run_distributed

FOLDER = Path(os.environ.get("DINOSCALE_GOLDEN", Path(__file__).parent))
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 12 * 4e-6, 4 * 5e-4  # of the reference in float32


def golden_config(facts: dict[str, Any], *, stage: int, accumulation: int, world_size: int) -> Any:
    """The run of trajectory.json as a RunConfig."""
    batch = facts["batch_size"]
    assert facts["adamw"] == {"betas": [0.9, 0.999], "eps": 1e-8}
    return parse_config(
        {
            "model": {
                "backbone": "vit_tiny_patch16_224",
                "patch_size": facts["patch_size"],
                "embed_dim": facts["embed_dim"],
                "depth": facts["depth"],
                "num_heads": facts["num_heads"],
                "drop_path_rate": 0.0,
            },
            "head": {
                "num_prototypes": facts["out_dim"],
                "hidden_dim": facts["head_hidden_dim"],
                "bottleneck_dim": facts["head_bottleneck_dim"],
                "norm_last_layer": facts["norm_last_layer"],
            },
            "crops": {
                "global_size": facts["img_size"],
                "local_size": facts["local_size"],
                "num_local": facts["local_crops"],
            },
            "dino": {
                "student_temp": facts["student_temp"],
                "center_momentum": facts["center_momentum"],
                "warmup_teacher_temp": facts["warmup_teacher_temp"],
                "teacher_temp": facts["teacher_temp"],
                "warmup_teacher_temp_epochs": facts["warmup_teacher_temp_epochs"],
                "momentum": facts["teacher_momentum"],
                "freeze_last_layer_epochs": facts["freeze_last_layer_epochs"],
            },
            "optim": {
                "lr": facts["peak_lr"] * 256 / batch,
                "min_lr": facts["min_lr"],
                "warmup_epochs": facts["warmup_epochs"],
                "weight_decay": facts["weight_decay"],
                "weight_decay_end": facts["weight_decay_end"],
                "clip_grad": facts["clip_grad_per_parameter"],
            },
            "train": {
                "epochs": facts["epochs"],
                "batch_size": batch,
                "micro_batch_size": batch // world_size // accumulation,
            },
            "eval": {"crop": facts["img_size"], "resize": facts["img_size"]},
            "engine": {"zero_stage": stage, "precision": "fp32"},
        }
    )


def follow_trajectory(folder: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On every rank: take the reference's steps for each of `runs`, return what it recorded."""
    facts = json.loads((Path(folder) / "trajectory.json").read_text())["config"]
    return [
        _Follower(Path(folder), facts, changes=run.pop("changes", {}), **run).follow()
        for run in runs
    ]


class _Follower:
    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        *,
        stage: int,
        accumulation: int,
        changes: dict[str, Any],
        first: int = 0,
        last: int | None = None,
        run_dir: str | None = None,
    ) -> None:
        """With `run_dir`: go on from its checkpoint, if it has one, and save after step `last`."""
        from dinoscale import distributed

        self.first, self.run_dir = first, run_dir
        self.world_size, self.rank = distributed.world_size(), distributed.rank()
        config = golden_config(
            facts, stage=stage, accumulation=accumulation, world_size=self.world_size
        )
        self.config: RunConfig = config.model_copy(
            update={
                section: getattr(config, section).model_copy(update=values)
                for section, values in changes.items()
            }
        )
        images = facts["batch_size"] * facts["steps_per_epoch"]
        self.plan = resolve(self.config, world_size=self.world_size, num_images=images)
        self.facts = facts
        self.last = self.plan.total_steps if last is None else last
        self.batches = load_file(folder / "trajectory_batches.safetensors")
        self.initial = load_file(folder / "trajectory_initial.safetensors")

    def follow(self) -> dict[str, Any]:
        from dinoscale.engine.build import build_pair, schedules_of
        from dinoscale.engine.step import train_step
        from dinoscale.models.weights import from_reference

        student, teacher = build_pair(self.config, self.plan)
        weights = from_reference(self.initial, norm_last_layer=self.config.head.norm_last_layer)

        def read(name: str, start: int, count: int) -> Tensor:
            return weights[name].flatten()[start : start + count].float()

        student.restore_master(read)
        teacher.restore(read)  # the center starts at zero
        if self.run_dir is not None:
            self._go_on(student, teacher)
        schedules = schedules_of(self.config, self.plan)
        record: dict[str, Any] = {"loss": [], "grad_norms": [], "center_norm": [], "states": {}}
        per_epoch = self.plan.steps_per_epoch
        for step in range(self.first, self.last):
            result = train_step(
                self._micro_batches(step % per_epoch),
                student,
                teacher,
                schedules.at(step),
                student_temp=self.config.dino.student_temp,
            )
            record["loss"].append(result.loss)
            record["grad_norms"].append(student.grad_norms())
            record["center_norm"].append(float(teacher.center.norm()))
            if step + 1 in (per_epoch, self.plan.total_steps):
                record["states"][str(step // per_epoch)] = self._state(student, teacher)
        if self.run_dir is not None:
            self._save(student, teacher)
        record["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return record

    def _go_on(self, student: Any, teacher: Any) -> None:
        from dinoscale.resume import find_checkpoint, restore

        checkpoint = find_checkpoint(Path(str(self.run_dir)))
        assert (0 if checkpoint is None else checkpoint.step) == self.first
        if checkpoint is not None:
            restore(checkpoint, student, teacher)

    def _save(self, student: Any, teacher: Any) -> None:
        from dinoscale import distributed
        from dinoscale.checkpoint.retention import Keep
        from dinoscale.checkpoint.save import Saver

        saver = Saver(Path(str(self.run_dir)), Keep(last=1))
        saver.begin(self.last, student, teacher, {"config": {}, "plan": {}, "progress": {}})
        result = saver.wait()
        assert result is not None
        assert result.error is None
        distributed.gather_objects(None)

    def _micro_batches(self, index: int) -> list[Any]:
        from dinoscale.engine.step import MicroBatch

        whole, size = self.batches, self.plan.micro_batch_size
        batches = []
        for micro in range(self.plan.accumulation_steps):
            first = (micro * self.world_size + self.rank) * size
            part = slice(first, first + size)
            batches.append(
                MicroBatch(
                    whole[f"batch{index}.global"][:, part],
                    whole[f"batch{index}.local"][:, part],
                    None,
                )
            )
        return batches

    def _state(self, student: Any, teacher: Any) -> dict[str, Any]:
        """This rank's fragments: (name, first element) -> values."""
        fragments = student.layout.fragments
        return {
            "center": teacher.center.clone(),
            "fragments": [
                {
                    "name": fragment.name,
                    "start": fragment.start,
                    "student": student_part.clone(),
                    "teacher": teacher_part.clone(),
                }
                for fragment, student_part, teacher_part in zip(
                    fragments, student.master, teacher.ema, strict=True
                )
            ],
        }


def assemble(states: list[dict[str, Any]], which: str, shapes: dict[str, Any]) -> dict[str, Tensor]:
    """Full tensors of `which`, "student" or "teacher", from all ranks' fragments."""
    flat = {name: torch.full((torch.Size(s).numel(),), torch.nan) for name, s in shapes.items()}
    for state in states:
        for part in state["fragments"]:
            values = part[which]
            flat[part["name"]][part["start"] : part["start"] + len(values)] = values
    return {name: values.view(shapes[name]) for name, values in flat.items()}


def weight_errors(results: list[Any], states: dict[str, Tensor], epoch: str) -> dict[str, float]:
    """Relative error of every weight tensor and the center after `epoch`."""
    errors = {}
    of_epoch = [result["states"][epoch] for result in results]
    for which in ("student", "teacher"):
        prefix = f"epoch{epoch}.{which}."
        expected = {
            key.removeprefix(prefix): value.double()
            for key, value in states.items()
            if key.startswith(prefix)
        }
        names = {part["name"] for state in of_epoch for part in state["fragments"]}
        actual = assemble(of_epoch, which, {name: expected[name].shape for name in names})
        assert expected.keys() - names <= {"head.last_layer.weight_g"}, expected.keys() - names
        for name in names:
            errors[f"{which}.{name}"] = _relative(actual[name], expected[name])
    center = states[f"epoch{epoch}.center"].flatten()
    errors["center"] = _relative(of_epoch[0]["center"], center)
    return errors


def require_reference(per_rank: list[list[Any]], runs: list[dict[str, Any]]) -> None:
    """Fail where what the ranks returned from `follow_trajectory` is not the reference's."""
    reference = json.loads((FOLDER / "trajectory.json").read_text())
    states = load_file(FOLDER / "trajectory_states.safetensors")
    expected_loss = [step["loss"] for step in reference["steps"]]
    for index, run in enumerate(runs):
        results = [rank[index] for rank in per_rank]
        assert results[0]["loss"] == pytest.approx(expected_loss, rel=LOSS_TOLERANCE), run
        for epoch in sorted({key.split(".")[0][5:] for key in states}):
            errors = weight_errors(results, states, epoch)
            worst = max(errors, key=lambda name: errors[name])
            assert errors[worst] < WEIGHT_TOLERANCE, (run, epoch, worst, errors[worst])


def _relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-12))


def _runs(world_size: int) -> list[dict[str, int]]:
    batch = json.loads((FOLDER / "trajectory.json").read_text())["config"]["batch_size"]
    return [
        {"stage": stage, "accumulation": accumulation}
        for stage in (0, 1, 2, 3)
        for accumulation in (1, 2)
        if batch % (world_size * accumulation) == 0
    ]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_stage_and_accumulation_follows_the_reference(world_size: int) -> None:
    runs = _runs(world_size)
    if not runs:
        pytest.skip("the recorded batch does not divide")
    per_rank = run_distributed(
        "tests.golden.test_trajectory:follow_trajectory",
        world_size=world_size,
        timeout_s=880,
        folder=str(FOLDER),
        runs=runs,
    )
    require_reference(per_rank, runs)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_that_recompute_follow_the_reference() -> None:
    reference = json.loads((FOLDER / "trajectory.json").read_text())
    states = load_file(FOLDER / "trajectory_states.safetensors")
    changes = {"compile": True, "checkpoint_every_k_blocks": 2, "recompute": "pointwise"}
    ((result,),) = run_distributed(
        "tests.golden.test_trajectory:follow_trajectory",
        world_size=1,
        timeout_s=880,
        folder=str(FOLDER),
        runs=[{"stage": 0, "accumulation": 1, "changes": {"engine": changes}}],
    )
    assert result["graphs"] >= 2  # of student and teacher
    assert result["loss"] == pytest.approx(
        [step["loss"] for step in reference["steps"]], rel=LOSS_TOLERANCE
    )
    errors = weight_errors([result], states, max(result["states"], key=int))
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < WEIGHT_TOLERANCE, (worst, errors[worst])


PARTS = [  # ranks, stage, accumulation: each goes on from the checkpoint of the one before
    (2, 2, 1),
    (1, 0, 2),
    (3, 3, 1),
    (2, 2, 1),
]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_that_changes_ranks_and_stages_midway_follows_the_reference(tmp_path: Path) -> None:
    reference = json.loads((FOLDER / "trajectory.json").read_text())
    batch = reference["config"]["batch_size"]
    if any(batch % (ranks * accumulation) for ranks, _, accumulation in PARTS):
        pytest.skip("the recorded batch does not divide")
    states = load_file(FOLDER / "trajectory_states.safetensors")
    steps, losses, results = len(reference["steps"]), [], []
    bounds = [steps * part // len(PARTS) for part in range(len(PARTS) + 1)]
    for part, (world_size, stage, accumulation) in enumerate(PARTS):
        run = {"stage": stage, "accumulation": accumulation, "run_dir": str(tmp_path)}
        per_rank = run_distributed(
            "tests.golden.test_trajectory:follow_trajectory",
            world_size=world_size,
            timeout_s=200,
            folder=str(FOLDER),
            runs=[run | {"first": bounds[part], "last": bounds[part + 1]}],
        )
        results = [rank[0] for rank in per_rank]
        losses += results[0]["loss"]
    expected = [step["loss"] for step in reference["steps"]]
    assert losses == pytest.approx(expected, rel=LOSS_TOLERANCE)
    last_epoch = max(results[0]["states"], key=int)
    errors = weight_errors(results, states, last_epoch)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < WEIGHT_TOLERANCE, (worst, errors[worst])
