"""Which frozen teachers go with a run, and which networks a configuration stands for."""

from typing import Any

import pytest

from dinoscale.config import RunConfig, parse_config
from dinoscale.errors import ConfigError

LARGE = {"backbone": "vit_large_patch14_dinov2"}


def _config(distill: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    return parse_config({"distill": {"teacher": "w.pth", **distill}, **sections})


_HEADS = {"head": {}, "patch_head": {"num_prototypes": 9}}
PATCHES = {"ibot": {"loss_weight": 1.0}, "patch_head": {"num_prototypes": 9}}


@pytest.mark.parametrize(
    ("distill", "sections", "says"),
    [
        ({"teacher": None, "model": LARGE}, {}, r"^distill.model: is of a frozen teacher; give"),
        ({"patch_head": {}}, {}, r"^distill.patch_head: is beside a head .*give distill.head too"),
        ({"teacher": None, "head": {}}, {}, r"^distill.head: is of a frozen teacher; give"),
        (
            {"head": {"num_prototypes": 7}},
            {},
            r"^distill.head.num_prototypes: 7 prototypes .* 65536 \(head.num_prototypes\); need",
        ),
        (
            {"head": {}, "patch_head": {"num_prototypes": 7}},
            PATCHES,
            r"^distill.patch_head.num_prototypes: 7 .* 9 \(patch_head.num_prototypes\)",
        ),
        ({"head": {}}, PATCHES, r"^distill.head.num_prototypes: 65536 .* 9 \(patch_head.num_pro"),
        (
            {"model": {"backbone": "resnet50"}, **_HEADS},
            PATCHES,
            r"^distill.model.backbone: resnet50 has no patches to teach; need a ViT, or ibot.loss",
        ),
        (
            {"model": LARGE},
            {"crops": {"global_size": 240}, "eval": {"crop": 240, "resize": 256}},
            r"^crops.global_size: 240 px is not a multiple .* 14 px; .*distill.model",
        ),
        ({}, {"anchor": {"class_weight": 1.0}, "train": {"init_from": "w"}}, r"^anchor.class_w"),
        ({}, {"gram": {"loss_weight": 1.0, "refresh_every_steps": 9}}, r"^gram.loss_weight: its"),
        ({"model": {"backbon": "x"}}, {}, r"^distill.model.backbon: unknown key"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    distill: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        _config(distill, **sections)


def test_a_teacher_of_which_nothing_is_said_has_the_networks_of_the_student() -> None:
    config = _config({}, **PATCHES, lora={"rank": 2}, train={"init_from": "w.pth"})
    teacher = config.of_teacher
    assert (teacher.model, teacher.head) == (config.model, config.head)
    assert teacher.patch_head == config.patch_head
    assert teacher.lora.rank == 0  # its weights are merged


def test_a_teacher_with_one_head_teaches_a_student_with_two() -> None:
    config = _config(
        {"model": LARGE, "head": {"num_prototypes": 9, "hidden_dim": 5}},
        **PATCHES,
        head={"num_prototypes": 9},
    )
    teacher = config.of_teacher
    assert teacher.model.backbone == LARGE["backbone"]
    assert (teacher.head.hidden_dim, teacher.patch_head) == (5, None)
    assert not RunConfig().distill.by_heads
    assert config.distill.by_heads
