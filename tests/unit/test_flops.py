"""FLOPs by formula are those that torch counts in a real network."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinoscale.config.load import parse_config
from dinoscale.engine.build import build_networks
from dinoscale.engine.flops import StepFlops, step_flops, vit_backward_flops, vit_forward_flops
from dinoscale.engine.model_sizes import PatchDims, dims_of, flops_of
from dinoscale.models.heads import DinoHead
from dinoscale.models.network import DinoNetwork
from dinoscale.models.zoo import build_backbone
from dinoscale.planning.plan.dropped_branches import dropped_flops

IMAGES = 3
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2}
HEAD = {"hidden_dim": 20, "bottleneck_dim": 12, "num_layers": 3, "num_prototypes": 50}


def _network(name: str) -> DinoNetwork:
    backbone = build_backbone(name, img_size=32, num_heads=2, **VIT)
    return DinoNetwork(backbone, DinoHead(24, **HEAD, norm_last_layer=True, batch_norm=False))


def _counted(
    network: DinoNetwork, num_local: int, keep: Tensor | None = None, masks: Tensor | None = None
) -> tuple[int, int, int]:
    """What torch counts of teacher, student forward and backward, per image."""
    globals_ = torch.randn(2 * IMAGES, 3, 32, 32)
    crops = [globals_, *([torch.randn(num_local * IMAGES, 3, 16, 16)] if num_local else [])]
    counts = []
    with sdpa_kernel(SDPBackend.MATH):  # plain products: each is counted, none is recomputed
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network([globals_])
        counts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            logits = network.head(network.backbone(crops, keep, masks=masks))
        counts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            logits.sum().backward()
        counts.append(counter.get_total_flops())
    teacher, forward, backward = (count // IMAGES for count in counts)
    return teacher, forward, backward


def _computed(*, num_local: int, num_special: int = 1) -> StepFlops:
    return step_flops(
        global_size=32, local_size=16, num_local=num_local, num_special=num_special, **VIT, **HEAD
    )


@pytest.mark.parametrize("num_local", [0, 3])
def test_the_formula_counts_what_torch_counts(num_local: int) -> None:
    flops = _computed(num_local=num_local)
    counted = _counted(_network("vit_small_patch16_224"), num_local)
    assert (flops.teacher, flops.student_forward, flops.student_backward) == counted
    assert flops.total == sum(counted)


def test_registers_are_tokens_too() -> None:
    flops = _computed(num_local=2, num_special=5)
    counted = _counted(_network("vit_small_patch14_reg4_dinov2"), 2)
    assert (flops.teacher, flops.student_forward, flops.student_backward) == counted


@pytest.mark.parametrize("others", [{}, {"rope": {}, "mask_key_bias": True, "local_norm": True}])
def test_layers_of_dinov2_and_3_are_counted_as_torch_counts_them(others: dict[str, Any]) -> None:
    config = parse_config(
        {
            "model": {
                **VIT,
                "num_heads": 2,
                "layer_scale": 1e-5,
                "ffn": "swiglu",
                "registers": 3,
                **others,  # a rotation multiplies no matrices
            },
            "head": HEAD,
            "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
            "eval": {"crop": 32, "resize": 32},
        }
    )
    dims = dims_of(config)
    flops, (network, _) = flops_of(dims), build_networks(config)
    counted = _counted(network, 2)
    assert (flops.teacher, flops.student_forward, flops.student_backward) == counted
    assert (dims.layer_scale, dims.num_special, dims.mlp_hidden) == (True, 4, 64)
    assert dims.mlp_kept == 2 * 64  # the gate's input and the other factor


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("part", [{}, {"lora": {"rank": 3}}, {"optim": {"trained_blocks": 1}}])
def test_branches_that_are_dropped_are_counted_as_torch_counts_them(
    uniform: bool, part: dict[str, Any]
) -> None:
    of_subset = {"drop_path_mode": "subset", "drop_path_uniform": uniform, "drop_path_rate": 0.4}
    config = parse_config(
        {
            "model": {**VIT, "num_heads": 2, **of_subset},
            "head": HEAD,
            "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
            "eval": {"crop": 32, "resize": 32},
            "train": {"init_from": "w.pth"},
            **part,
        }
    )
    dims, network = dims_of(config), build_networks(config)[0]
    flops, dropped = flops_of(dims), dropped_flops(dims, micro_batch_size=IMAGES)
    _, *of_student = _counted(network, 2, torch.rand(2, 2, 4 * IMAGES))
    assert flops.student_forward + flops.student_backward - dropped == sum(of_student)
    assert dropped > 0


@pytest.mark.parametrize("own_head", [False, True])
def test_the_masked_patches_go_through_a_head_once_in_each_network(own_head: bool) -> None:
    sizes = {"global_size": 32, "local_size": 16, "num_local": 2}
    values = {
        "model": {**VIT, "num_heads": 2},
        "head": HEAD,
        "crops": sizes,
        "eval": {"crop": 32, "resize": 32},
        "ibot": {"loss_weight": 1.0, "mask_rule": "dinov2"},
    }
    of_patches = {**HEAD, "num_prototypes": 30} if own_head else HEAD
    if own_head:
        values["patch_head"] = of_patches
    config = parse_config(values)
    network, plain = build_networks(config)[0], _computed(num_local=2)
    head = network.patch_head or network.head
    assert (network.patch_head is not None) == own_head
    rows = 1000
    with FlopCounterMode(display=False) as counter:
        head(torch.randn(rows, 24))
    masked = 0.5 * 2 * 16 * (0.1 + 0.5) / 2  # an image's two crops of 16 patches, half masked
    added = round(masked * counter.get_total_flops() / rows)
    dims = dims_of(config)
    flops = flops_of(dims)
    assert flops.teacher == plain.teacher + added
    assert flops.student_forward == plain.student_forward + added
    assert flops.student_backward == plain.student_backward + 2 * added
    assert dims.parameters == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_weights_that_do_not_train_have_no_product_for_their_gradient(ffn: str) -> None:
    config = parse_config(
        {
            "model": {**VIT, "num_heads": 2, "layer_scale": 1e-5, "ffn": ffn},
            "head": HEAD,
            "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
            "eval": {"crop": 32, "resize": 32},
            "lora": {"rank": 3, "patch_embed": True},  # so that gradients pass all blocks
            "train": {"init_from": "w.pth"},
        }
    )
    dims = dims_of(config)
    flops, (network, _) = flops_of(dims), build_networks(config)
    assert dims.trained == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert sum(scalars for scalars, _ in dims.groups) == dims.trained
    assert dims.mlp_kept == (2 * 64 if ffn == "swiglu" else 4 * 24)  # as without adapters
    counted = _counted(network, 2)
    assert (flops.teacher, flops.student_forward, flops.student_backward) == counted


@pytest.mark.parametrize("ibot", [False, True])
@pytest.mark.parametrize(
    ("part", "first"),
    [
        ({"optim": {"trained_blocks": 1}}, 2),
        ({"optim": {"trained_blocks": 3}}, 0),
        ({"lora": {"rank": 3}}, 0),
        ({"lora": {"rank": 3, "norms": True}}, 0),
    ],
)
def test_gradients_stop_where_nothing_before_trains(
    part: dict[str, Any], first: int, ibot: bool
) -> None:
    config = parse_config(
        {
            "model": {**VIT, "depth": 3, "num_heads": 2},
            "head": HEAD,
            "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
            "eval": {"crop": 32, "resize": 32},
            "ibot": {"loss_weight": 1.0 if ibot else 0.0},
            "train": {"init_from": "w.pth"},
            **part,
        }
    )
    dims, network = dims_of(config), build_networks(config)[0]
    masks = torch.arange(16) % 2 == torch.zeros(2 * IMAGES, 1) if ibot else None
    *_, backward = _counted(network, 2, masks=masks)
    of_class_tokens = flops_of(replace(dims, patches=PatchDims()))
    assert of_class_tokens.student_backward == backward
    assert dims.first_backward == (0 if ibot else first)  # all lead to the mask token


def test_the_gram_network_is_a_forward_more() -> None:
    values = {
        "model": {**VIT, "num_heads": 2},
        "head": HEAD,
        "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
        "eval": {"crop": 32, "resize": 32},
        "gram": {"loss_weight": 1.0, "teacher": "w.pth", "crop_size": 64},
    }
    config = parse_config(values)
    backbone, flops = build_networks(config)[0].backbone, flops_of(dims_of(config))
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        backbone([torch.randn(2, 3, 64, 64)], all_patches=True)
    assert flops.gram == counter.get_total_flops()
    assert flops.total == _computed(num_local=2).total + flops.gram


def test_the_anchor_is_a_forward_more_over_the_global_crops() -> None:
    values = {
        "model": {**VIT, "num_heads": 2},
        "head": HEAD,
        "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
        "eval": {"crop": 32, "resize": 32},
        "anchor": {"class_weight": 1.0},
        "train": {"init_from": "w.pth"},
    }
    flops = flops_of(dims_of(parse_config(values)))
    assert flops.anchor == flops.teacher_backbone
    assert flops.total == _computed(num_local=2).total + flops.anchor


def test_vit_s16_at_224_pixels_takes_the_published_number_of_products() -> None:
    """Touvron et al. 2021 give 4.6 G multiply-adds for DeiT-S; two FLOPs each."""
    small = {"num_patches": 196, "patch_size": 16, "embed_dim": 384, "depth": 12}
    assert vit_forward_flops(**small) / 2 == pytest.approx(4.6e9, rel=0.01)
    assert vit_backward_flops(**small) < 2 * vit_forward_flops(**small)
