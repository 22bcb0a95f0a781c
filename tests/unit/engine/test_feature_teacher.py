"""A student's loss on a frozen teacher's features: which crops count, and what it passes on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config import RunConfig, parse_config, resolve
from dinoscale.data.augmentation.masks import Masks
from dinoscale.engine.build import build_networks, loss_weights_of, shapes_only
from dinoscale.engine.frozen.features import FeatureTeacher
from dinoscale.engine.micro_batch import FeatureTargets, MicroBatch, MicroBatchLoss, Targets
from dinoscale.engine.model_sizes import dims_of, flops_of
from dinoscale.losses.features import feature_distances
from dinoscale.losses.patch_grid import resized
from dinoscale.models.network import FeatureNetwork
from dinoscale.models.sync_bn import convert_sync_batch_norm
from dinoscale.training.feed import masks_of

IMAGES, WIDTH, PATCHES = 6, 30, 16
MODEL = {
    "backbone": "vit_tiny_patch16_224",
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "drop_path_rate": 0.0,
}


def _config(**sections: dict[str, Any]) -> RunConfig:
    teacher = MODEL | {"patch_size": 4, "embed_dim": WIDTH, "num_heads": 3}
    values: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "head": {"num_prototypes": 7, "hidden_dim": 8, "bottleneck_dim": 4},
        "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
        "ibot": {"loss_weight": 1.0, "mask_group": 2},
        "distill": {
            "teacher": "w.pth",
            "model": teacher,
            "class_feature_weight": 1.5,
            "patch_feature_weight": 0.5,
        },
        "train": {"batch_size": IMAGES, "micro_batch_size": IMAGES},
        "eval": {"crop": 32, "resize": 32},
    }
    return parse_config(
        {key: values.get(key, {}) | sections.get(key, {}) for key in values | sections}
    )


def _alone(**distill: Any) -> RunConfig:
    return _config(
        dino={"loss_weight": 0.0},
        ibot={"loss_weight": 0.0},
        crops={"num_local": 0},
        distill=distill,
    )


def _loss(config: RunConfig, masks: Masks | None) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """The loss, its terms, and the mapped features and targets of classes and patches."""
    generator = torch.Generator().manual_seed(5)
    crops = 2 * IMAGES
    shapes = [(crops, WIDTH), (crops, PATCHES, WIDTH)] * 2
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    own = [tensor.requires_grad_() for tensor in tensors[:2]]
    targets = Targets(torch.empty(2, IMAGES, 0), features=FeatureTargets(*tensors[2:]))
    objective = MicroBatchLoss(targets, loss_weights_of(config), masks=masks)
    return objective.of_features(*own), objective.terms, tensors


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
def test_is_a_weighted_mean_over_the_crops_that_are_not_masked(kind: Any) -> None:
    config = _config(distill={"feature_loss": kind})
    masks = masks_of(config, step=0, first_image=0, images=IMAGES)
    assert masks is not None
    loss, terms, (classes, patches, *targets) = _loss(config, masks)
    seen = ~masks.chosen
    assert int(seen.sum()) == IMAGES  # of twice as many crops
    of_classes, of_patches = (
        feature_distances(own[seen], target[seen], kind=kind).mean()
        for own, target in zip((classes, patches), targets, strict=True)
    )
    torch.testing.assert_close(terms["class_feature_loss"], of_classes.detach())
    torch.testing.assert_close(terms["patch_feature_loss"], of_patches.detach())
    torch.testing.assert_close(loss, 1.5 * of_classes + 0.5 * of_patches)
    for gradient in torch.autograd.grad(loss, (classes, patches)):
        assert not gradient[~seen].any()
        assert gradient[seen].flatten(1).any(1).all()


def test_without_masks_all_global_crops_count() -> None:
    config = _alone()
    loss, terms, (classes, patches, *targets) = _loss(config, None)
    assert [*terms] == [*loss_weights_of(config).terms]  # and nothing of heads
    expected = feature_distances(classes, targets[0], kind="cosine").mean()
    torch.testing.assert_close(terms["class_feature_loss"], expected.detach())
    assert float(loss.detach()) > float(terms["patch_feature_loss"])
    assert patches.shape[0] == len(classes)


def test_the_network_maps_its_features_of_the_global_crops() -> None:
    config = _config()
    student, _ = build_networks(config)
    assert student.class_map is not None
    assert student.patch_map is not None
    seen: dict[str, Tensor] = {}

    class Objective:
        wants_patches = wants_features = True

        def of_class_tokens(self, tokens: Tensor) -> None:
            seen["tokens"] = tokens

        def of_patches(self, tokens: Tensor) -> None:
            seen["patches"] = tokens

        def of_prototypes(self, *_: Any) -> Tensor:
            return torch.zeros(())

        def of_features(self, classes: Tensor | None, patches: Tensor | None) -> Tensor:
            assert classes is not None
            assert patches is not None
            seen["classes"], seen["mapped"] = classes, patches
            return torch.zeros(())

    crops = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    student(crops, objective=Objective())
    torch.testing.assert_close(seen["classes"], student.class_map(seen["tokens"][:4]))
    torch.testing.assert_close(seen["mapped"], student.patch_map(seen["patches"]))
    assert seen["mapped"].shape == (4, PATCHES, WIDTH)


@pytest.mark.usefixtures("shallow_resnet")
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_teacher_gives_the_features_of_its_backbone_in_evaluation(kind: str) -> None:
    of_patches, changes = kind == "vit", {}
    if not of_patches:
        changes = {"model": {"backbone": "resnet50"}, "patch_feature_weight": 0.0}
    config = _config(distill=changes)
    network = FeatureNetwork(shapes_only(config.of_teacher).backbone, patches=of_patches)
    convert_sync_batch_norm(network, lambda summand: summand)
    plain = build_networks(config.of_teacher)[0].backbone.eval()
    generator = torch.Generator().manual_seed(2)
    for name, buffer in plain.named_buffers():  # statistics of batch norm
        if name.endswith("var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("mean"):
            buffer.uniform_(-0.1, 0.1, generator=generator)
    weights = {f"backbone.{name}": value for name, value in plain.state_dict().items()}
    plan = resolve(config, world_size=1, num_images=IMAGES)
    images = torch.randn(2, 3, 3, 32, 32, generator=generator)
    batch = MicroBatch(images, images[:0], None)
    with torch.no_grad():
        expected = plain([images.flatten(0, 1)], **({"all_patches": True} if of_patches else {}))
    classes, patches = expected if of_patches else (expected, None)
    assert float(classes.norm(dim=-1).min()) > 0.1
    teacher = FeatureTeacher(network, config, plan, torch.float32)
    assert not teacher.targets(batch).classes.any()  # nothing is loaded yet
    teacher.load(weights, identity="given")
    found = teacher.targets(batch)
    assert teacher.identity == "given"
    torch.testing.assert_close(found.classes, classes)
    if patches is None:
        assert found.patches is None
    else:
        on_grid = resized(patches, num_patches=PATCHES, interpolation="bilinear")
        torch.testing.assert_close(found.patches, on_grid)
    rounded = FeatureTeacher(network, config, plan, torch.bfloat16)
    rounded.load(weights, identity="given")
    near = torch.cosine_similarity(rounded.targets(batch).classes.float(), classes, dim=-1)
    assert float(near.min()) > 0.99


def test_maps_leave_the_other_weights_as_they_were_drawn() -> None:
    weightless = {"class_feature_weight": 0.0, "patch_feature_weight": 0.0, "teacher": None}
    plain, _ = build_networks(_config(distill=weightless | {"model": None}))
    mapped, _ = build_networks(_config())
    before, after = plain.state_dict(), mapped.state_dict()
    assert after.keys() - before.keys() == {
        f"{kind}_map.{part}" for kind in ("class", "patch") for part in ("weight", "bias")
    }
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_alone_there_are_no_heads_and_the_plan_counts_both_networks() -> None:
    config = _alone()
    names = [name for name, _ in shapes_only(config).named_parameters()]
    assert {name.partition(".")[0] for name in names} == {"backbone", "class_map", "patch_map"}
    dims = dims_of(config)
    teacher = shapes_only(config.of_teacher).backbone
    assert dims.followed is not None
    assert dims.followed.parameters == sum(p.numel() for p in teacher.parameters())
    assert dims.parameters == sum(p.numel() for p in shapes_only(config).parameters())
    flops = flops_of(dims)
    assert flops.teacher == 0  # nobody asks the average
    # The teacher alone: 64 patches of 4 x 4 pixels, two blocks, two crops.
    tokens, width = 65, WIDTH
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    assert flops.followed == 2 * (2 * block + 2 * 64 * 3 * 16 * width)
    assert flops.student_head == 2 * (2 + 2 * PATCHES) * 24 * WIDTH
    assert flops.total == flops.followed + flops.student_forward + flops.student_backward
