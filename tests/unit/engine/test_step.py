"""The order of a step's work, with small fakes for student and teacher."""

import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.engine.micro_batch import LossWeights, MicroBatch, Targets
from dinoscale.engine.step import train_step


class _Both:
    """Student and teacher in one; records the calls."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.mean_target, self.mean_patch_target = torch.full((4,), 0.25), None

    def set_hyperparameters(self, _now: Any) -> None:
        pass

    def begin(self, _batches: Any, *, temp: float) -> None:
        assert temp == 0.04

    def targets(self, batch: MicroBatch, *, temp: float, gram_counts: bool) -> Targets:
        assert temp == 0.04
        assert gram_counts
        return Targets(torch.full((2, batch.global_crops.shape[1], 4), 0.25))

    def count_patch_targets(self, target_sum: Tensor | None) -> None:
        assert target_sum is None

    def __call__(self, *args: Any) -> Tensor:
        self.done.append("forward")
        self.objective = objective = args[2]
        objective.terms |= dict.fromkeys(("dino_loss", "dino_global_loss"), torch.tensor(2.0))
        return torch.ones(())

    def backward(self, _loss: Tensor) -> None:
        self.done.append("backward")

    def accumulate(self) -> None:
        self.done.append("accumulate")

    def step(self, *, non_finite: Tensor) -> Tensor:
        self.done.append("step")
        return non_finite

    def update(self, *_: Any, **__: Any) -> None:
        pass


class _Now:
    step, teacher_temp, momentum, local_weight, gram_weight = 0, 0.04, 0.996, 1.0, 1.0
    gram_counts = True


def test_next_micro_batch_is_made_amid_the_step_and_one_is_held() -> None:
    both, held = _Both(), list[Any]()

    def micro_batches() -> Iterator[MicroBatch]:
        for _ in range(3):
            assert [batch() for batch in held if batch() is not None] == []
            both.done.append("made")
            batch = MicroBatch(torch.zeros(2, 1, 3, 4, 4), torch.zeros(0, 1, 3, 2, 2), None)
            held.append(weakref.ref(batch))
            yield batch
            del batch

    fakes: Any = (both, both, _Now())
    train_step(micro_batches(), *fakes, loss_weights=LossWeights(0.1))
    a_micro_batch = ["made", "backward", "accumulate", "forward"]
    assert both.done == ["made", "forward", *a_micro_batch * 2, "backward", "step"]


def test_kl_is_that_of_the_cross_entropy_whatever_its_weight() -> None:
    both = _Both()
    batch = MicroBatch(torch.zeros(2, 1, 3, 4, 4), torch.zeros(0, 1, 3, 2, 2), None)
    fakes: Any = (both, both, _Now())
    result = train_step([batch], *fakes, loss_weights=LossWeights(0.1, dino=0.5))
    assert result.loss == 1
    assert result.kl == pytest.approx(2 - math.log(4))


def test_local_crops_have_the_weight_of_the_step() -> None:
    both, now = _Both(), _Now()
    now.local_weight = 0.5
    batch = MicroBatch(torch.zeros(2, 1, 3, 4, 4), torch.zeros(3, 1, 3, 2, 2), None)
    weights = LossWeights(0.1, local_is_scheduled=True)
    fakes: Any = (both, both, now)
    result = train_step([batch], *fakes, loss_weights=weights)
    assert result.kl == pytest.approx(2 - math.log(4))  # of the term without weights
    generator = torch.Generator().manual_seed(0)
    rows, v = (torch.randn(n, 3, generator=generator) for n in (5, 4))
    loss = both.objective.of_prototypes(rows, None, v, None)
    terms = both.objective.terms
    of_local = terms["dino_loss"] - terms["dino_global_loss"]
    torch.testing.assert_close(loss, terms["dino_global_loss"] + 0.5 * of_local)
    assert of_local > 0.1
