"""Settings of features that follow a frozen teacher's: what goes together, and what is refused."""

from typing import Any

import pytest

from dinoscale.config import RunConfig, parse_config
from dinoscale.config.same_network import require_same_network
from dinoscale.errors import ConfigError

TEACHER = {"backbone": "vit_base_patch16_224"}


def _config(
    distill: dict[str, Any] | None = None, **sections: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    given = {"teacher": "w.pth", "model": TEACHER, "class_feature_weight": 1.0}
    return {"distill": given | (distill or {}), **sections}


def _parsed(*args: Any, **sections: Any) -> RunConfig:
    return parse_config(_config(*args, **sections))


def test_features_beside_the_own_heads_and_alone() -> None:
    beside = _parsed()
    assert (beside.has_heads, beside.distill.by_features, beside.distill.by_heads) == (1, 1, 0)
    assert _parsed({"class_feature_weight": 0.0}).distill.by_heads
    alone = _parsed(dino={"loss_weight": 0.0}, crops={"num_local": 0})
    assert not alone.has_heads
    resnet = _parsed(
        model={"backbone": "resnet50"}, dino={"loss_weight": 0.0}, crops={"num_local": 0}
    )
    assert resnet.of_teacher.model.width == 768
    for name, width in (("convnext_large.dinov3_lvd1689m", 1536), ("resnet34", 512)):
        both = _parsed({"model": {"backbone": name}, "patch_feature_weight": 1.0})
        assert both.of_teacher.model.width == width
    odd = {"global_size": 208}
    assert _parsed({"model": {"backbone": "resnet18"}}, crops=odd).distill.by_features


def test_a_phase_has_the_maps_and_heads_of_the_one_before() -> None:
    before, alone = _parsed(), {"dino": {"loss_weight": 0.0}, "crops": {"num_local": 0}}
    require_same_network("next", before, _parsed({"class_feature_weight": 0.5}))
    for other in (
        _parsed({"patch_feature_weight": 1.0}),
        _parsed({"model": {"backbone": "vit_large_patch16_224"}}),
        _parsed(**alone),
    ):
        with pytest.raises(ConfigError, match=r"phases\.next\.(distill|dino\.loss_weight): "):
            require_same_network("next", before, other)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no_teacher": (
        _config({"teacher": None, "model": None}),
        "distill.class_feature_weight: there is nothing to follow; give distill.teacher",
    ),
    "heads": (
        _config({"head": {"num_prototypes": 7}}),
        "distill.head: features are learned without the teacher's heads",
    ),
    "all_masked": (
        _config(ibot={"loss_weight": 1.0, "mask_prob": 1.0}),
        "distill.class_feature_weight: the teacher looks at global crops that are not masked",
    ),
    "local_crops_for_nothing": (
        _config(dino={"loss_weight": 0.0}),
        "crops.num_local: 8 local crops serve the loss of dino alone",
    ),
    "unknown_width": (
        _config({"model": {"backbone": "vit_so400m_patch14_siglip_224"}}),
        "distill.model.embed_dim: the width of 'vit_so400m_patch14_siglip_224' is not known",
    ),
    "unknown_convnext": (
        _config({"model": {"backbone": "convnextv2_tiny"}}),
        "backbone: 'convnextv2_tiny' is none of the ResNets and ConvNeXts that can be built",
    ),
    "sizes_of_a_convnext": (
        _config({"model": {"backbone": "convnext_tiny", "depth": 3}}),
        "depth: convnext_tiny has none, leave it out",
    ),
    "not_whole_places": (
        _config(
            {"model": {"backbone": "resnet18"}, "patch_feature_weight": 1.0},
            crops={"global_size": 208},
        ),
        "208 px is not a multiple of the patch size 32 px; nearest: 192 or 224 (of the frozen",
    ),
    "not_whole_places_of_a_convnext": (
        _config({"model": {"backbone": "convnext_tiny"}}, crops={"global_size": 208}),
        "208 px is not a multiple of the patch size 32 px",
    ),
    "heads_of_a_convnext": (
        _config({"model": {"backbone": "convnext_tiny"}, "class_feature_weight": 0.0}),
        "distill.model.backbone: 'convnext_tiny' teaches by its features alone; give distill.cl",
    ),
    "a_convnext_as_student": (
        _config(model={"backbone": "convnext_tiny"}),
        "model.backbone: 'convnext_tiny' can only be a frozen teacher whose features are learned",
    ),
    "patches_for_a_resnet": (
        _config({"patch_feature_weight": 1.0}, model={"backbone": "resnet50"}),
        "distill.patch_feature_weight: resnet50 has no tokens, need 0.0",
    ),
    "other_patches": (
        _config({"model": {"backbone": "vit_base_patch16_224", "patch_size": 15}}),
        "(of the frozen teacher)",
    ),
    "nothing_to_learn": (
        {"model": {"backbone": "resnet50"}, "dino": {"loss_weight": 0.0}},
        "dino.loss_weight: nothing to learn",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_go_together_is_refused(name: str) -> None:
    values, text = MISTAKES[name]
    with pytest.raises(ConfigError) as found:
        parse_config(values)
    assert text in str(found.value)
