"""The published numbers of both linear probes."""

import pytest
import torch
from torch import nn

from dinoscale.errors import ConfigError
from dinoscale.evaluate.classification.linear_heads import FeatureKind
from dinoscale.evaluate.classification.linear_protocols import DinoProtocol, GridProtocol
from dinoscale.models.zoo import build_backbone


def _vit(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_backbone(name, img_size=224)


def test_grid_is_four_inputs_at_thirteen_rates() -> None:
    plan = GridProtocol().plan(_vit("vit_small_patch16_224"), images=1000)
    assert plan.kinds == tuple(FeatureKind(n, pooled) for n in (1, 4) for pooled in (False, True))
    assert len(plan.rates) == 13
    assert (plan.rates[0], plan.rates[-1]) == (0.5e-5, 0.05)  # scaled by 128 / 256
    assert (plan.steps, plan.eval_every, plan.interpolation) == (12_500, 1250, "bicubic")


def test_grid_falls_by_the_step() -> None:
    plan = GridProtocol(iterations=4).plan(_vit("vit_small_patch16_224"), images=10)
    expected = [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]  # (1 + cos(pi i / 4)) / 2
    assert [plan.factor(i) for i in range(4)] == pytest.approx(expected)


def test_dino_falls_by_the_epoch() -> None:
    plan = DinoProtocol(epochs=2, batch_size=64).plan(_vit("vit_small_patch16_224"), images=130)
    assert plan.steps == 6
    assert plan.eval_every == 3
    assert [plan.factor(i) for i in range(6)] == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5])
    assert plan.rates == (0.001 * 64 / 256,)


def test_dino_takes_four_class_tokens_of_vit_s_and_pools_vit_b() -> None:
    small = DinoProtocol().plan(_vit("vit_small_patch16_224"), images=10)
    assert small.kinds == (FeatureKind(4, pooled=False),)
    assert (small.blocks, small.interpolation) == (4, "bilinear")
    base = DinoProtocol().plan(_vit("vit_base_patch16_224"), images=10)
    assert base.kinds == (FeatureKind(1, pooled=True, interleaved=True),)
    assert base.blocks == 1


@pytest.mark.parametrize("protocol", [GridProtocol(), DinoProtocol()])
def test_a_resnet_is_probed_on_its_pooled_output(protocol: GridProtocol | DinoProtocol) -> None:
    plan = protocol.plan(_vit("resnet50"), images=10)
    assert plan.kinds == (FeatureKind(1, pooled=False),)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (GridProtocol(iterations=0), "iterations"),
        (GridProtocol(batch_size=0), "batch_size"),
        (GridProtocol(eval_every=0), "eval_every"),
        (DinoProtocol(epochs=-1), "epochs"),
        (DinoProtocol(lr=float("nan")), "lr"),
    ],
)
def test_numbers_out_of_range_are_refused(
    protocol: GridProtocol | DinoProtocol, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        protocol.plan(_vit("vit_small_patch16_224"), images=10)
