"""The gradient rule around the optimizer's step, on one process and without DeepSpeed."""

import pytest
import torch
from torch import Tensor, nn

from dinoscale.engine.gradients import ClipMode, GradientRule
from dinoscale.engine.param_groups import build_optimizer

NAN = torch.nan


class _Trained:
    """Two parameter groups under the rule; the second may be frozen."""

    def __init__(self, name: str, *, mode: ClipMode = "global") -> None:
        torch.manual_seed(0)
        self.network = nn.ModuleDict({"mlp": nn.Linear(3, 5), "last_layer": nn.Linear(5, 4)})
        self.optimizer = build_optimizer(name, self.network)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1
        self.rule = GradientRule(clip=0.5, mode=mode, sharded=False)
        self.rule.attach(self.optimizer)
        for label, weight in self.network.named_parameters():
            self.rule.watch(weight, [label], [(label, 0, weight.numel())])
        self.rule.arm()

    def step(self, seed: int, *, bad: float | None = None, non_finite: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in self.network.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        if bad is not None:
            self.network["mlp"].weight.grad[1, 1] = bad
        gradients = [weight.grad for weight in self.network.parameters()]
        self.rule.measure(gradients, non_finite=torch.tensor(non_finite))
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.network.parameters()]

    def moments(self) -> list[Tensor]:
        states = [self.optimizer.state[weight] for weight in self.network.parameters()]
        return [value.clone() for state in states for value in state.values()]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("skipped_at", [0, 2])
@pytest.mark.parametrize("how", [{"bad": NAN}, {"bad": -torch.inf}, {"non_finite": True}])
def test_skipped_step_leaves_no_trace(
    name: str, skipped_at: int, how: dict[str, float | bool]
) -> None:
    spared, skipping = _Trained(name), _Trained(name)
    for seed in range(4):
        if seed == skipped_at:
            before = skipping.weights()
            skipping.step(99, **how)  # type: ignore[arg-type]
            assert skipping.rule.skipped
            assert _equal(before, skipping.weights())
        for trained in (spared, skipping):
            trained.step(seed)
            assert not trained.rule.skipped
    assert _equal(spared.weights(), skipping.weights())
    assert _equal(spared.moments(), skipping.moments())


@pytest.mark.parametrize("mode", ["per_tensor", "per_network", "global"])
def test_clipped_gradients_have_the_configured_norm(mode: ClipMode) -> None:
    trained = _Trained("sgd", mode=mode)
    before = trained.weights()
    trained.step(0)
    moved = [(old - new) / 0.1 for old, new in zip(before, trained.weights(), strict=True)]
    norms = torch.stack([move.norm() for move in moved])
    of_clipped = {
        "per_tensor": norms,
        "per_network": norms.view(2, 2).norm(dim=1),  # weight and bias of each layer
        "global": norms.norm(),
    }[mode]
    torch.testing.assert_close(of_clipped, torch.full_like(of_clipped, 0.5))
    measured = trained.rule.squared_norms
    torch.testing.assert_close(trained.rule.global_norm(), measured.sum().sqrt())
    assert trained.rule.networks == ["mlp", "last_layer"]
    by_network = measured.view(2, 2).sum(1).sqrt()
    torch.testing.assert_close(trained.rule.network_norms(), by_network)
    assert measured.min() > 0.5**2


def test_frozen_group_keeps_its_weights_and_counts_no_step() -> None:
    trained = _Trained("adamw")
    (frozen,) = (g for g in trained.optimizer.param_groups if g["name"] == "prototypes")
    frozen["frozen"] = True
    before = [weight.detach().clone() for weight in frozen["params"]]
    trained.step(0)
    assert _equal(before, frozen["params"])
    assert all(weight not in trained.optimizer.state for weight in frozen["params"])
    assert all(weight.grad is not None for weight in frozen["params"])
