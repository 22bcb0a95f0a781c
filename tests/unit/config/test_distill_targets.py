"""Stored targets of a frozen teacher: what they go with, and what a plan counts."""

from dataclasses import replace
from typing import Any

import pytest

from dinoscale.config import RunConfig, parse_config
from dinoscale.engine.model_sizes import dims_of, flops_of
from dinoscale.errors import ConfigError
from dinoscale.planning.plan.frozen_networks import features, followed_forward, kept
from dinoscale.planning.plan.memory_model import persistent
from dinoscale.training.targets.settings import require_storable
from tests.unit.plan.tiny import SETUP

MODEL = {
    "backbone": "vit_tiny_patch16_224",
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
}
WIDE = MODEL | {"embed_dim": 48}
GRAM = {"loss_weight": 1.0, "refresh_every_steps": 9}
BY_FEATURES = {"class_feature_weight": 1.0, "model": WIDE}


def _config(distill: dict[str, Any], **sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": MODEL,
        "head": {"num_prototypes": 7, "hidden_dim": 8, "bottleneck_dim": 4},
        "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
        "eval": {"crop": 32, "resize": 32},
    }
    return parse_config({"distill": distill, **values, **sections})


@pytest.mark.parametrize(
    ("distill", "sections", "says"),
    [
        ({"teacher": "w.pth"}, {}, r"^distill.targets: t stands in place of .*=w.pth; set one"),
        (BY_FEATURES, {"gram": GRAM}, r"^gram.loss_weight: distill.targets are of crops"),
        ({}, {"gram": GRAM}, r"^gram.loss_weight: its network"),
        ({}, {"train": {"micro_batch_size": "auto"}}, r"^train.micro_batch_size: auto tries"),
        ({}, {"train": {"max_rollbacks": 1}}, r"^train.max_rollbacks: 1 would skip images"),
        ({"head": {"num_prototypes": 8}}, {}, r"^distill.head.num_prototypes: 8 prototypes"),
    ],
)
def test_what_does_not_go_with_stored_targets_is_refused_by_name(
    distill: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        _config({"targets": "t", **distill}, **sections)


@pytest.mark.parametrize(
    ("distill", "sections", "says"),
    [
        ({}, {}, r"^distill.teacher: there is nothing to store"),
        ({"teacher": "w"}, {"train": {"micro_batch_size": "auto"}}, r"^train.micro_batch_size: au"),
        ({"teacher": "w"}, {"phases": [{"name": "a"}]}, r"^phases: .* add phase=NAME, of a$"),
        ({"teacher": "w", **BY_FEATURES}, {"gram": GRAM}, r"^gram.loss_weight: distill.targets"),
    ],
)
def test_targets_that_no_run_could_learn_from_are_not_stored(
    distill: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        require_storable(_config(distill, **sections))


@pytest.mark.parametrize("own", [True, False])
def test_a_plan_counts_neither_a_frozen_network_nor_a_forward_of_the_average(own: bool) -> None:
    head = {"num_prototypes": 7, "hidden_dim": 8, "bottleneck_dim": 5}
    heads = {"head": head} | ({"patch_head": head | {"bottleneck_dim": 6}} if own else {})
    sections = {"ibot": {"loss_weight": 1.0, "mask_group": 1}}
    live, stored = (
        dims_of(_config({key: "x", "model": WIDE, **heads}, **sections))
        for key in ("teacher", "targets")
    )
    assert live.frozen_teacher is not None
    assert stored.frozen_teacher is stored.followed is None
    assert stored.target_prototypes == live.target_prototypes == (7 * 5, 7 * (6 if own else 5))
    products = 2 * (2 * 7 * 5 + stored.patches.masked * stored.target_prototypes[1])
    assert flops_of(stored).teacher_head == round(products)
    average = dims_of(_config({}, **sections))
    held = persistent(stored, SETUP)["teacher"] - persistent(average, SETUP)["teacher"]
    assert held == pytest.approx(SETUP.weight_bytes * 7 * (5 + 6 if own else 5))
    assert flops_of(live).teacher > flops_of(average).teacher
    assert flops_of(stored).teacher < flops_of(average).teacher


@pytest.mark.parametrize("patch_weight", [0.0, 0.5])
def test_a_plan_of_stored_features_counts_the_maps_and_the_loss_alone(patch_weight: float) -> None:
    by = BY_FEATURES | {"patch_feature_weight": patch_weight}
    live, stored = (dims_of(_config({key: "x", **by})) for key in ("teacher", "targets"))
    assert replace(live, followed=None) == replace(stored, followed=None)
    flops = flops_of(live)
    assert flops.followed > 0
    assert flops_of(stored) == replace(flops, followed=0)
    for of_loss in (features, kept):
        assert of_loss(stored, SETUP) == of_loss(live, SETUP)
        assert (of_loss(stored, SETUP) > 0) == (patch_weight > 0)
    assert followed_forward(live, SETUP) > 0
    assert followed_forward(stored, SETUP) == 0
    assert live.followed is not None
    weights = SETUP.weight_bytes * live.followed.parameters
    saved = persistent(live, SETUP)["teacher"] - persistent(stored, SETUP)["teacher"]
    assert saved == pytest.approx(weights)
