"""The network of a frozen teacher, asked about patches of the student's grid."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.data.augmentation.masks import Masks
from dinoscale.engine.build import build_networks
from dinoscale.engine.frozen.teacher import DistillingNetwork, FrozenTeacher
from dinoscale.engine.model_sizes import dims_of, flops_of
from dinoscale.errors import ConfigError
from dinoscale.losses.patch_grid import resized
from dinoscale.models.network import DinoNetwork
from dinoscale.planning.plan.communication import transfers
from dinoscale.planning.plan.memory_model import _moments, peak, persistent
from dinoscale.planning.plan.partition import Setup
from dinoscale.training.feed import masks_of
from tests.distributed.tiny_run import dinov2, tiny_config
from tests.unit.plan.tiny import SETUP

IMAGES = 3
LARGE: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
}


def _config(patch_size: int = 8) -> RunConfig:
    model = {**LARGE, "patch_size": patch_size}
    heads = {"head": {"num_prototypes": 33, "hidden_dim": 26, "bottleneck_dim": 17}}
    heads["patch_head"] = {"num_prototypes": 29, "hidden_dim": 14, "bottleneck_dim": 11}
    distill = {"teacher": "w.pth", "model": model, **heads}
    sections = dinov2("centering", patch_head=True, distill=distill, ibot={"mask_rule": "dinov3"})
    return tiny_config(**sections)


class _Asked:
    """What an objective is asked about."""

    wants_patches = False

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}

    def of_class_tokens(self, tokens: Tensor) -> None:
        """Nothing."""

    def of_prototypes(self, classes: Any, patches: Any, weight_v: Tensor, *_: Any) -> Tensor:
        """Keep the unit vectors."""
        self.rows |= {"classes": classes} if patches is None else {"patches": patches}
        return weight_v.new_zeros(())


def _asked(network: Any, images: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
    objective = _Asked()
    with torch.no_grad():
        network([images], None, objective, None, rows)
    return objective.rows


def _network(config: RunConfig) -> DinoNetwork:
    return build_networks(config.of_teacher)[1].eval()


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_chosen_patches_are_those_of_the_students_grid(patch_size: int) -> None:
    config = _config(patch_size)
    network, masks = _network(config), _masks(config)
    images = torch.randn(2 * IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = _asked(DistillingNetwork(network, patch_size=8), images, masks.rows)
    with torch.no_grad():
        classes, patches = network.backbone([images], all_patches=True)
        assert network.patch_head is not None
        on_grid = resized(patches, num_patches=16, interpolation="bicubic")
        expected = {
            "classes": network.head.unit_vectors(classes),
            "patches": network.patch_head.unit_vectors(on_grid.flatten(0, 1)[masks.rows]),
        }
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-5, atol=1e-6)
    if patch_size == 8:  # the plain network, bit for bit
        plain = _asked(network, images, masks.rows)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_frozen_teacher_computes_what_its_weights_and_tracked_statistics_do() -> None:
    config = _config()
    head = config.distill.head
    assert head is not None
    with_norm = config.distill.model_copy(
        update={"head": head.model_copy(update={"batch_norm": True})}
    )
    config = config.model_copy(update={"distill": with_norm})
    network = _network(config)
    generator = torch.Generator().manual_seed(2)
    for value in network.state_dict().values():
        if value.is_floating_point():  # statistics are above 0
            value.copy_(torch.rand(value.shape, generator=generator))
    empty = DistillingNetwork(copy.deepcopy(network).to("meta"), patch_size=8)
    teacher = FrozenTeacher(empty, config, _no_plan(), torch.float32)
    teacher.load(network.state_dict(), identity="that")
    images = torch.randn(2 * IMAGES, 3, 32, 32, generator=generator)
    rows = _masks(config).rows
    found = _asked(teacher.forward, images, rows)
    for name, expected in _asked(network, images, rows).items():
        assert torch.equal(found[name], expected), name
    assert teacher.identity == "that"
    assert teacher.num_bytes() == 4 * sum(p.numel() for p in network.parameters())
    assert not any(p.requires_grad for p in empty.parameters())


@pytest.mark.usefixtures("shallow_resnet")
def test_a_resnet_teaches_class_tokens_and_plan_says_that_it_knows_none() -> None:
    head = {"num_prototypes": 33, "hidden_dim": 20, "bottleneck_dim": 8}
    distill = {"teacher": "w.pth", "model": {"backbone": "resnet50"}, "head": head}
    config = tiny_config(distill=distill)
    network = _network(config)
    empty = DistillingNetwork(copy.deepcopy(network).to("meta"), patch_size=8)
    teacher = FrozenTeacher(empty, config, _no_plan(), torch.float32)
    teacher.load(network.state_dict(), identity=None)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found, expected = (_asked(f, images, None) for f in (teacher.forward, network))
    assert found.keys() == {"classes"}
    assert torch.equal(found["classes"], expected["classes"])
    with pytest.raises(ConfigError, match=r"^distill.model.backbone: plan supports only ViTs"):
        dims_of(config)


def _masks(config: RunConfig) -> Masks:
    masks = masks_of(config, step=0, first_image=0, images=IMAGES)
    assert masks is not None
    return masks


def test_the_student_sees_the_patches_that_are_drawn_and_its_mask_token_has_a_gradient() -> None:
    config = _config()
    masks = _masks(config)
    hidden = _masks(tiny_config(**dinov2("centering", patch_head=True, ibot=_rule())))
    assert not masks.masks.any()
    assert hidden.masks.flatten().nonzero().flatten().equal(hidden.rows)
    for name in ("rows", "weights", "chosen"):
        assert torch.equal(getattr(masks, name), getattr(hidden, name))
    student = build_networks(config)[0].backbone
    images = torch.randn(2 * IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens, _ = student([images], masks=masks.masks, patch_rows=masks.rows)
    assert torch.equal(tokens, student([images]))
    tokens.sum().backward()
    gradient = student.mask_token.grad
    assert gradient is not None  # it is exactly zero, as in the authors' code
    assert not gradient.any()


def _no_plan() -> Any:
    """Only stage 3 reads one."""


def _rule() -> dict[str, Any]:
    return {"mask_rule": "dinov3"}


def test_the_plan_counts_the_teachers_weights_forward_and_gathers() -> None:
    config = _config(4)
    own = dims_of(config.model_copy(update={"distill": RunConfig().distill}))
    dims, theirs = dims_of(config), dims_of(_alone(config))
    teacher = dims.frozen_teacher
    assert teacher is not None
    assert teacher.parameters == sum(p.numel() for p in _network(config).parameters())
    assert teacher.patches.masked == own.patches.masked != theirs.patches.masked
    flops, of_own, of_theirs = flops_of(dims), flops_of(own), flops_of(theirs)
    assert flops.teacher_backbone == of_theirs.teacher_backbone
    assert flops.student_backward == of_own.student_backward
    assert flops.total - of_own.total == flops.teacher - of_own.teacher > 0
    for stage, parts in ((0, 1), (2, 1), (3, SETUP.world_size)):
        setup = _at(stage)
        more = persistent(dims, setup)["teacher"] - persistent(own, setup)["teacher"]
        assert more == setup.weight_bytes * teacher.parameters / parts
        assert peak(dims, setup).total > peak(own, setup).total
    gathered = {t.what: t.sent_bytes for t in transfers(dims, _at(3))}
    before = {t.what: t.sent_bytes for t in transfers(own, _at(3))}
    assert gathered["weights"] == before["weights"] * 2 / 3  # the average's forward is not there
    share = 3 / 4 * SETUP.weight_bytes * SETUP.accumulation_steps
    assert gathered["frozen teacher's weights"] == share * teacher.parameters


def test_the_plan_counts_the_averages_forward_for_batch_norm() -> None:
    config = _config(4)
    head = config.head.model_copy(update={"batch_norm": True})
    normed = config.model_copy(update={"head": head})
    dims, plain = dims_of(normed), dims_of(config)
    own = flops_of(dims_of(normed.model_copy(update={"distill": RunConfig().distill})))
    before, after = flops_of(plain), flops_of(dims)
    assert before.average == 0
    of_classes = 2 * 2 * dims.bottleneck * dims.prototypes  # not multiplied by prototypes
    of_patches = 2 * dims.patches.masked * dims.patches.bottleneck * dims.patches.prototypes
    assert after.average == own.teacher - round(of_classes + of_patches)
    assert after.total - before.total == after.average > own.teacher_backbone
    sent = [{t.what: t.sent_bytes for t in transfers(d, _at(3))} for d in (plain, dims)]
    of_weight = [one["weights"] / d.parameters for one, d in zip(sent, (plain, dims), strict=True)]
    assert of_weight[1] == pytest.approx(3 / 2 * of_weight[0])
    without, there = (_moments(d, _at(3))["forward of the average"] for d in (plain, dims))
    assert not any(without.values())
    assert there["activations"] > 0 < there["buffers"]


def _alone(config: RunConfig) -> RunConfig:
    """A run of the teacher's networks."""
    return config.of_teacher.model_copy(update={"distill": RunConfig().distill})


def _at(stage: int) -> Setup:
    return replace(SETUP, zero_stage=stage)
