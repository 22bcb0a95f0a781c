"""Schedules against the reference, every step of every recorded case."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.engine.schedules import Schedules, cosine, teacher_temp

Json = Callable[[str], dict[str, Any]]
Tensors = Callable[[str], dict[str, Tensor]]


def _close(ours: list[float], reference: Tensor) -> None:
    assert len(ours) == len(reference) > 0
    assert ours == pytest.approx(reference.tolist(), rel=1e-12, abs=1e-15)


def test_every_cosine_case_matches(golden_json: Json, golden_tensors: Tensors) -> None:
    tensors = golden_tensors("schedules")
    for i, case in enumerate(golden_json("schedules")["cosine"]):
        total = case["epochs"] * case["niter_per_ep"]
        ours = [
            cosine(
                step,
                base=case["base_value"],
                final=case["final_value"],
                total_steps=total,
                warmup_steps=case["warmup_epochs"] * case["niter_per_ep"],
                start=case["start_warmup_value"],
            )
            for step in range(total)
        ]
        _close(ours, tensors[f"case{i}"])


def test_every_teacher_temp_case_matches(golden_json: Json, golden_tensors: Tensors) -> None:
    tensors = golden_tensors("schedules")
    for j, case in enumerate(golden_json("schedules")["teacher_temp"]):
        ours = [
            teacher_temp(
                epoch,
                warmup_temp=case["warmup_teacher_temp"],
                temp=case["teacher_temp"],
                warmup=case["warmup_epochs"],
            )
            for epoch in range(case["epochs"])
        ]
        _close(ours, tensors[f"temp{j}"])


def test_schedules_of_the_recorded_run_match(golden_json: Json) -> None:
    run = golden_json("trajectory")
    c, steps = run["config"], run["steps"]
    per_epoch = c["steps_per_epoch"]
    schedules = Schedules(
        steps_per_epoch=per_epoch,
        total_steps=c["epochs"] * per_epoch,
        warmup_steps=c["warmup_epochs"] * per_epoch,
        peak_lr=c["peak_lr"],
        min_lr=c["min_lr"],
        weight_decay=c["weight_decay"],
        weight_decay_end=c["weight_decay_end"],
        momentum=c["teacher_momentum"],
        momentum_end=1.0,
        warmup_teacher_temp=c["warmup_teacher_temp"],
        teacher_temp=c["teacher_temp"],
        warmup_teacher_temp_epochs=c["warmup_teacher_temp_epochs"],
        teacher_temp_per_step=False,
        freeze_last_layer_epochs=c["freeze_last_layer_epochs"],
    )
    ours = [schedules.at(step["step"]) for step in steps]
    assert [now.epoch for now in ours] == [step["epoch"] for step in steps]
    for name, recorded in (
        ("lr", "lr"),
        ("weight_decay", "weight_decay"),
        ("momentum", "teacher_momentum"),
        ("teacher_temp", "teacher_temp"),
    ):
        reference = torch.tensor([step[recorded] for step in steps], dtype=torch.float64)
        _close([getattr(now, name) for now in ours], reference)
