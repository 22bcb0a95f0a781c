"""The stored outputs of a frozen teacher's heads are seen as those of its network."""

from typing import Any

import pytest
import torch

from dinoscale.config import parse_config, resolve
from dinoscale.engine.build import build_frozen_teacher, shapes_only
from dinoscale.engine.frozen.seen import Seen
from dinoscale.engine.frozen.stored import LAST_LAYER, StoredHeads
from dinoscale.engine.micro_batch import MicroBatch, StoredTargets
from dinoscale.training.feed import masks_of

IMAGES = 3
HEAD = {"num_prototypes": 9, "hidden_dim": 8, "bottleneck_dim": 5}
# Prototypes with lengths of their own, plain ones, and those of a head of the patches'.
HEADS: dict[str, dict[str, Any]] = {
    "shared": {"head": HEAD | {"norm_last_layer": False}},
    "plain": {"head": HEAD | {"weight_norm": False}},
    "own": {"head": HEAD, "patch_head": HEAD | {"bottleneck_dim": 4}},
}


@pytest.mark.parametrize("patches", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_units_and_prototypes_are_those_of_the_network(kind: str, patches: bool) -> None:
    heads = {k: v for k, v in HEADS[kind].items() if patches or k == "head"}
    model = {"backbone": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 24, "depth": 1}
    config = parse_config(
        {
            "model": model | {"num_heads": 2},
            **heads,
            "crops": {"global_size": 32, "local_size": 16},
            "ibot": {"loss_weight": float(patches), "mask_prob": 1.0, "mask_group": 1},
            "distill": {"teacher": "given"},
            "train": {"batch_size": IMAGES, "micro_batch_size": IMAGES},
            "engine": {"precision": "bf16", "zero_stage": 0},
            "eval": {"crop": 32, "resize": 32},
        }
    )
    plan = resolve(config, world_size=1, num_images=IMAGES)
    teacher = build_frozen_teacher(config, plan)
    generator = torch.Generator().manual_seed(1)
    shapes = shapes_only(config.of_teacher)
    weights = {
        name: 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in shapes.named_parameters()
    }
    teacher.load(weights, identity="given")
    crops = torch.randn(2, IMAGES, 3, 32, 32, generator=generator)
    masks = masks_of(config, step=0, first_image=0, images=IMAGES)
    batch = MicroBatch(crops, crops[:0], None, masks)
    live, found = Seen(copies=False), Seen(copies=False)
    with torch.no_grad():
        teacher.look(batch, live)
    assert (live.patches is not None) == patches
    units = None if live.patches is None else live.patches.units.clone()
    stored = StoredTargets(live.classes.units.clone(), units)
    heads_alone = StoredHeads(shapes, torch.bfloat16)
    heads_alone.load({k: v for k, v in weights.items() if LAST_LAYER in k}, identity="given")
    heads_alone.look(MicroBatch(crops, crops[:0], None, masks, stored=stored), found)
    assert heads_alone.identity == "given"
    for one, other in ((live.classes, found.classes), (live.patches, found.patches)):
        assert (one is None) == (other is None)
        if one is None or other is None:
            continue
        assert one.plain == other.plain == (kind == "plain")
        assert torch.equal(one.units, other.units)
        assert float(one.units.norm(dim=-1).min()) > 0.9
        assert torch.equal(one.weight_v, other.weight_v)
        assert (one.weight_g is None) == (other.weight_g is None) == (kind != "shared")
        if one.weight_g is not None and other.weight_g is not None:
            assert torch.equal(one.weight_g, other.weight_g)
