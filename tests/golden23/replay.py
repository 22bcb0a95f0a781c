"""A recorded run taken again by the literal reference, all ranks in this process."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden23.compare import PER_STEP, Record, parts_of
from tests.golden23.recorded import RecordedRun
from tests.reference_dinov2 import ReferenceStep, Share
from tests.reference_dinov3 import ReferenceStep3

LITERAL = {"dinov2": ReferenceStep, "dinov3": ReferenceStep3}


def replay(
    run: RecordedRun,
    *,
    dtype: torch.dtype = torch.float64,
    ranks: int | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Record:
    """Take all steps; names of tensors are the reference's.

    Args:
        run: gives settings, input and initial weights.
        dtype: of all arithmetic.
        ranks: that share the batch; default as recorded.
        changes: settings to change, section -> field -> value.
    """
    ranks = ranks or run.ranks
    config = run.config(changes=changes)
    weights = {name: value.to(dtype) for name, value in run.initial.items()}
    step = LITERAL[run.generation](config, torch.device("cpu"), weights)
    record: Record = {key: [] for key in PER_STEP}
    for number in range(len(run.steps)):
        now = run.values(number)
        step.local_weight = now.local_weight
        record["losses"].append(step(shares_of(run, number, ranks, dtype), now))
        record["grad"].append(dict(step.grad_norms))
        record["parts"].append(parts_of(step.grad_norms))
        record["student"].append(_norms(step.student))
        record["teacher"].append(_norms(step.teacher))
        centers = {} if config.dino.targets == "sinkhorn_knopp" else step.centers
        record["centers"].append({kind: center.norm().item() for kind, center in centers.items()})
    record["last"] = {
        "student": step.student.state_dict(),
        "teacher": step.teacher.state_dict(),
        "centers": {kind: center.flatten() for kind, center in centers.items()},
    }
    return record


@functools.cache
def replayed(run: RecordedRun) -> Record:
    """All steps as recorded, in float64."""
    return replay(run)


def expected_of(run: RecordedRun) -> Record:
    """The record; final tensors that are not stored are those of a replay.

    The literal reference repeats the norms of all tensors at all steps to their last digits, and
    the final tensors that are stored to those of float32 (test_reference.py).
    """
    record = run.record()
    if record["last"].keys() >= {"student", "teacher"}:
        return record
    return record | {"last": replayed(run)["last"] | record["last"]}


def shares_of(run: RecordedRun, number: int, ranks: int, dtype: torch.dtype) -> list[Share]:
    """The batch of a step, split over ranks."""
    global_crops, local_crops = run.crops(number)
    wholes = global_crops.to(dtype), local_crops.to(dtype), run.masks(number)
    parts: list[tuple[Tensor, ...]] = [whole.chunk(ranks, dim=1) for whole in wholes]
    return [Share(*part) for part in zip(*parts, strict=True)]


def _norms(network: nn.Module) -> dict[str, float]:
    return {name: value.norm().item() for name, value in network.named_parameters()}
