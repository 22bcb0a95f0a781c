"""bf16 along the golden trajectory, 12 steps on 2 ranks, at every ZeRO stage.

The yardstick for weights is how far they moved: |a - b| / |b - initial|, all tensors together. A
relative error per tensor says little here, AdamW steps the bias of the keys (whose gradient is zero
but for rounding) in random directions. Measured, the worst of student and teacher after epochs 0
and 2; each tolerance is 3 times the measured number or a little more:

    against the reference      weights 0.033    loss 0.0142
    stages 0, 1 to each other  weights 4e-8     loss 0         (same sums, other padding)
    stages 2, 3 to each other  weights 0.0045   loss 0.0024
    stages 0, 1 to 2, 3        weights 0.021    loss 0.0088    (gradients kept in bf16 or float32)
    float32, for comparison    weights 9e-6     loss 2e-6
"""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dinoscale.models.weights import from_reference
from tests.golden.test_trajectory import FOLDER, assemble
from tests.harness import run_distributed

STAGES = (0, 1, 2, 3)
WEIGHTS_TO_REFERENCE, LOSS_TO_REFERENCE = 0.1, 0.045
WEIGHTS_BETWEEN_STAGES, LOSS_BETWEEN_STAGES = 0.065, 0.03
WEIGHTS_OF_A_KIND = 0.015  # stages 0 and 1, and stages 2 and 3, do the same arithmetic
LOSS_OF_A_KIND = 0.008
STATES = [(epoch, which) for epoch in ("0", "2") for which in ("student", "teacher")]

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """Recorded losses and weights: initial, and (epoch, student or teacher) -> weights."""
    recorded = load_file(FOLDER / "trajectory_states.safetensors")
    steps = json.loads((FOLDER / "trajectory.json").read_text())["steps"]
    states = {}
    for epoch, which in STATES:
        prefix = f"epoch{epoch}.{which}."
        states[epoch, which] = {
            key.removeprefix(prefix): value
            for key, value in recorded.items()
            if key.startswith(prefix) and not key.endswith("weight_g")
        }
    initial = load_file(FOLDER / "trajectory_initial.safetensors")
    return {
        "loss": torch.tensor([step["loss"] for step in steps], dtype=torch.float64),
        "states": states,
        "initial": from_reference(initial, norm_last_layer=True),
    }


@pytest.fixture(scope="module")
def bf16_runs(golden: dict[str, Any]) -> list[dict[str, Any]]:
    """Stages 0-3, then stage 2 with 3 micro-batches a step: losses and weights in full."""
    changes = {"engine": {"precision": "bf16"}}
    runs = [{"stage": stage, "accumulation": 1, "changes": changes} for stage in STAGES]
    runs.append({"stage": 2, "accumulation": 3, "changes": changes})
    per_rank = run_distributed(
        "tests.golden.test_trajectory:follow_trajectory",
        world_size=2,
        timeout_s=280,
        folder=str(FOLDER),
        runs=runs,
    )
    results = []
    for of_ranks in zip(*per_rank, strict=True):
        states = {}
        for epoch, which in STATES:
            shapes = {name: w.shape for name, w in golden["states"][epoch, which].items()}
            states[epoch, which] = assemble([r["states"][epoch] for r in of_ranks], which, shapes)
        loss = torch.tensor(of_ranks[0]["loss"], dtype=torch.float64)
        results.append({"loss": loss, "states": states})
    return results


def _squared(a: Weights, b: Weights) -> Tensor:
    assert a.keys() == b.keys()
    return torch.stack([(a[name].double() - b[name].double()).square().sum() for name in a]).sum()


def _weight_error(run: dict[str, Any], other: dict[str, Any], initial: Weights) -> float:
    """Largest |run - other| / |other - initial| over `STATES`."""
    errors = []
    for key in STATES:
        moved = _squared(other["states"][key], initial)
        errors.append(float((_squared(run["states"][key], other["states"][key]) / moved).sqrt()))
    return max(errors)


def _loss_error(run: dict[str, Any], other: dict[str, Any]) -> float:
    return float(((run["loss"] - other["loss"]) / other["loss"]).abs().max())


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("index", range(5), ids=[*(f"stage{s}" for s in STAGES), "accumulated"])
def test_bf16_stays_within_its_band_of_the_float32_reference(
    golden: dict[str, Any], bf16_runs: list[dict[str, Any]], index: int
) -> None:
    run = bf16_runs[index]
    assert _loss_error(run, golden) < LOSS_TO_REFERENCE
    assert 1e-3 < _weight_error(run, golden, golden["initial"]) < WEIGHTS_TO_REFERENCE


@pytest.mark.distributed
@pytest.mark.slow
def test_bf16_stages_agree_with_each_other(
    golden: dict[str, Any], bf16_runs: list[dict[str, Any]]
) -> None:
    for first in STAGES:
        for second in STAGES[first + 1 :]:
            of_a_kind = first // 2 == second // 2
            run, other = bf16_runs[second], bf16_runs[first]
            error = _weight_error(run, other, golden["initial"])
            assert error < (WEIGHTS_OF_A_KIND if of_a_kind else WEIGHTS_BETWEEN_STAGES)
            limit = LOSS_OF_A_KIND if of_a_kind else LOSS_BETWEEN_STAGES
            assert _loss_error(run, other) < limit, (first, second)
