"""Classifiers trained together against each alone, and the tokens that they take."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoscale.engine.schedules import cosine
from dinoscale.evaluate.classification.linear_heads import FeatureKind, LinearHeads, TokenFeatures
from dinoscale.evaluate.classification.linear_protocols import GRID_RATES
from dinoscale.models.zoo import build_backbone

SIZES = {"patch_size": 8, "embed_dim": 32, "num_heads": 1, "img_size": 16}


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_classifiers_trained_together_equal_each_trained_alone() -> None:
    steps, classes = 20, 4
    x, labels = _random(steps, 16, 6), torch.arange(steps * 16).view(steps, 16) % classes
    rates = torch.tensor(GRID_RATES, dtype=torch.float64) * 100  # far enough to tell them apart
    heads = LinearHeads(
        num_heads=len(rates), num_classes=classes, width=6, seed=0, dtype=torch.float64
    )
    alone = [nn.Linear(6, classes, dtype=torch.float64) for _ in rates]
    optimizers = []
    for g, layer in enumerate(alone):
        layer.weight.data.copy_(heads.weight[g])
        layer.bias.data.zero_()
        optimizers.append(torch.optim.SGD(layer.parameters(), lr=float(rates[g]), momentum=0.9))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers]
    for step in range(steps):
        factor = cosine(step, base=1.0, final=0.0, total_steps=steps)
        heads.step(x[step], labels[step], rates * factor)
        for layer, optimizer, schedule in zip(alone, optimizers, schedules, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[step]), labels[step]).backward()
            optimizer.step()
            schedule.step()
    together = torch.stack([layer.weight.data for layer in alone])
    assert (together - heads.weight).abs().max() < 1e-10
    assert (torch.stack([layer.bias.data for layer in alone]) - heads.bias).abs().max() < 1e-10
    assert (heads.weight[0] - heads.weight[-1]).abs().max() > 0.1


def test_fresh_classifiers_are_normal_with_std_one_hundredth() -> None:
    heads = LinearHeads(num_heads=2, num_classes=50, width=200, seed=0)
    assert heads.weight.std() == pytest.approx(0.01, rel=0.02)
    assert not heads.bias.any()
    assert not torch.equal(heads.weight[0], heads.weight[1])
    other = LinearHeads(num_heads=2, num_classes=50, width=200, seed=1)
    assert not torch.equal(heads.weight, other.weight)


def test_a_class_token_and_a_mean_patch_token_are_interleaved() -> None:
    features = torch.tensor([[1.0, 2.0, 3.0, 10.0, 20.0, 30.0]])  # class token, mean patch token
    kind = FeatureKind(1, pooled=True, interleaved=True)
    assert kind.take(features, stored=1, token_dim=3).tolist() == [[1, 10, 2, 20, 3, 30]]


@pytest.mark.parametrize(
    ("blocks", "pooled", "taken"),
    [(1, False, [3]), (1, True, [3, 9]), (3, False, [1, 2, 3]), (3, True, [1, 2, 3, 9])],
)
def test_inputs_are_the_last_class_tokens_and_the_mean_patch_token(
    blocks: int, pooled: bool, taken: list[int]
) -> None:
    features = torch.tensor([[1.0, 2.0, 3.0, 9.0]])  # three blocks, oldest first; mean patch
    assert FeatureKind(blocks, pooled).take(features, stored=3, token_dim=1).tolist() == [taken]


def test_features_are_the_normalised_tokens_of_the_backbone_without_registers() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("vit_small_patch14_reg4_dinov2", depth=3, **SIZES).eval()
    images = torch.randn(2, 3, 16, 24)
    tokens = TokenFeatures(backbone, blocks=2)
    found = tokens([images])
    before, last = backbone.intermediate(images, 2)
    assert found.shape == (2, tokens.embed_dim) == (2, 3 * 32)
    torch.testing.assert_close(found[:, :32], before[:, 0])
    torch.testing.assert_close(found[:, 32:64], backbone([images]))
    torch.testing.assert_close(found[:, 64:], last[:, 1 + 4 :].mean(dim=1))  # 4 registers


def test_every_classifier_counts_its_own_right_answers() -> None:
    heads = LinearHeads(num_heads=2, num_classes=7, width=7, seed=0)
    heads.weight[0] = torch.eye(7)  # says the class of each row
    heads.weight[1] = torch.eye(7).roll(1, dims=0)  # says the next one
    rows = torch.eye(7) + 0.01 * torch.arange(7)
    # The second ranks class i + 1 first and then 0, 6, 5, 4, 3, 2, 1: rows 1 and 2 miss the top 5.
    assert heads.num_correct(rows, torch.arange(7)) == [(7, 7), (0, 5)]
