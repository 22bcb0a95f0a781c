"""The benchmark's reference step computes the same as ours, so the comparison is fair."""

import pytest
import torch

from dinoscale.config import RunConfig
from tests.distributed.plain_run import train_plainly
from tests.distributed.tiny_run import micro_batches, tiny_config, tiny_plan
from tests.harness import run_distributed

STEPS = 3

# Numbers that matter: all tensors are clipped, the center moves fast enough to keep the loss large.
_OPTIM = {"clip_grad": 0.02, "weight_decay": 0.4, "lr": 0.2}
_CASES = ((0, False), (1, True))  # epochs of frozen prototypes, prototypes of unit norm


def both_losses() -> list[list[tuple[float, float]]]:
    """Losses of ours and of the reference, means over ranks: of each case, a pair a step."""
    return [_losses_of(*case) for case in _CASES]


def _losses_of(frozen_epochs: int, norm_last_layer: bool) -> list[tuple[float, float]]:
    from dinoscale.engine.build import build_pair, loss_weights_of, schedules_of
    from dinoscale.engine.step import train_step
    from dinoscale.runtime import distributed
    from tests.reference import ReferenceStep

    config = _config(frozen_epochs, norm_last_layer)
    plan = tiny_plan(config)
    schedules = schedules_of(config, plan)
    student, teacher = build_pair(config, plan)
    reference = ReferenceStep(config, torch.device("cpu"))
    losses = []
    for step in range(STEPS):
        (batch,), now = micro_batches(config, plan, step), schedules.at(step)
        ours = train_step(
            [batch],
            student,
            teacher,
            now,
            loss_weights=loss_weights_of(config),
            stop_asked=step == 1 and distributed.rank() == 0,
            bad_images=distributed.rank() + 1,
            saving=step == 2 and distributed.rank() == 1,
            waited_s=0.5 + distributed.rank(),
        )
        ranks = distributed.world_size()
        saving = step == 2 and ranks > 1
        told = (step == 1, sum(range(1, ranks + 1)), saving, ranks - 0.5)  # of all ranks, to each
        assert (ours.stop, ours.bad_images, ours.saving, ours.waited_s) == told
        crops = [*batch.global_crops.unbind(), *batch.local_crops.unbind()]
        theirs = torch.tensor(reference(crops, now), dtype=torch.float64)
        distributed.all_reduce_sum(theirs)
        losses.append((ours.loss, theirs.item() / distributed.world_size()))
    return losses


def _config(frozen_epochs: int, norm_last_layer: bool) -> RunConfig:
    return tiny_config(
        engine={"precision": "fp32"},
        optim=_OPTIM,
        dino={"center_momentum": 0.5, "freeze_last_layer_epochs": frozen_epochs},
        head={"norm_last_layer": norm_last_layer},
    )


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_reference_has_our_losses(world_size: int) -> None:
    of_cases, *_ = run_distributed(
        "tests.distributed.test_reference_step:both_losses", world_size=world_size, timeout_s=120
    )
    for case, losses in zip(_CASES, of_cases, strict=True):
        ours, theirs = (list(values) for values in zip(*losses, strict=True))
        train_plainly(_config(*case), steps=STEPS).require_losses(ours, theirs)
        assert ours[-1] != pytest.approx(ours[0], rel=1e-3)  # the steps moved something
