"""bf16 along the golden trajectory, 12 steps on 2 ranks, at every ZeRO stage.

The yardstick for weights is how far they moved: |a - b| / |b - initial|, all tensors together but
the biases of the keys, see `plain_run.error`; for losses it is |a - b| / |b|, all steps together.
Every tolerance is what plain torch makes of the same steps with a network in bf16, on this machine,
with the gradients of the ranks summed in bf16 (as stages 0 and 1 do) or float32 (as 2 and 3), and
with the images of a batch in either order.
"""

import itertools
from collections.abc import Iterable

import pytest
import torch

from tests.distributed.plain_run import WEIGHTS, Rounding, Run, error
from tests.golden.test_trajectory import FOLDER, assemble, exact_trajectory, plain_trajectory
from tests.harness import run_distributed

RANKS = 2
STAGES = (0, 1, 2, 3)
EPOCHS = (0, 2)
SUMS = (torch.bfloat16, torch.float32)  # of stages 0 and 1, of stages 2 and 3


@pytest.fixture(scope="module")
def plain_runs() -> list[Run]:
    """Plain torch in bf16: of each kind of `SUMS`, a run with the images in either order."""
    return [
        plain_trajectory(
            Rounding(network=torch.bfloat16, sums=sums, ranks=RANKS), backwards=backwards
        )
        for sums in SUMS
        for backwards in (False, True)
    ]


@pytest.fixture(scope="module")
def bf16_runs() -> list[Run]:
    """Stages 0-3, then stage 2 with 3 micro-batches a step: losses and weights in full."""
    changes = {"engine": {"precision": "bf16"}}
    runs = [{"stage": stage, "accumulation": 1, "changes": changes} for stage in STAGES]
    runs.append({"stage": 2, "accumulation": 3, "changes": changes})
    per_rank = run_distributed(
        "tests.golden.test_trajectory:follow_trajectory",
        world_size=RANKS,
        timeout_s=280,
        folder=str(FOLDER),
        runs=runs,
    )
    shapes = {name: w.shape for name, w in exact_trajectory()["student"].items()}
    return [
        {
            "losses": of_ranks[0]["loss"],
            "states": {
                epoch: {
                    which: assemble([r["states"][str(epoch)] for r in of_ranks], which, shapes)
                    for which in ("student", "teacher")
                }
                for epoch in EPOCHS
            },
        }
        for of_ranks in zip(*per_rank, strict=True)
    ]


def _differences(run: Run, other: Run) -> tuple[float, float]:
    """Of losses and weights; the largest of `EPOCHS`."""
    losses, expected = (torch.tensor(r["losses"], dtype=torch.float64) for r in (run, other))
    begin = {"initial": exact_trajectory()["initial"]}
    weights = [error(run["states"][e], other["states"][e] | begin) for e in EPOCHS]
    return float((losses - expected).norm() / expected.norm()), max(weights)


def _largest(pairs: Iterable[tuple[Run, Run]]) -> tuple[float, float]:
    losses, weights = zip(*(_differences(*pair) for pair in pairs), strict=True)
    return max(losses), max(weights)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("index", range(5), ids=[*(f"stage{s}" for s in STAGES), "accumulated"])
def test_bf16_rounds_the_steps_as_in_plain_torch(
    bf16_runs: list[Run], plain_runs: list[Run], index: int
) -> None:
    losses, weights = _differences(bf16_runs[index], exact_trajectory())
    of_losses, of_weights = _largest((run, exact_trajectory()) for run in plain_runs)
    assert losses <= WEIGHTS * of_losses
    assert of_weights / WEIGHTS <= weights <= WEIGHTS * of_weights


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(STAGES, 2)])
def test_bf16_stages_agree_with_each_other(
    bf16_runs: list[Run], plain_runs: list[Run], first: int, second: int
) -> None:
    """Those of a kind (0 and 1, 2 and 3) do the same arithmetic in another order."""
    of_a_kind = first // 2 == second // 2
    orders = zip(plain_runs[::2], plain_runs[1::2], strict=True)
    of_losses, of_weights = _largest(orders if of_a_kind else itertools.combinations(plain_runs, 2))
    losses, weights = _differences(bf16_runs[second], bf16_runs[first])
    assert losses <= WEIGHTS * of_losses
    assert weights <= WEIGHTS * of_weights
