"""What the replicated teacher holds in the compute dtype, and what it does not."""

import torch

from dinoscale.engine.frozen.seen import Seen
from dinoscale.engine.frozen.weights import Replicated
from dinoscale.engine.shards import end_to_end
from dinoscale.models.heads import DinoHead
from dinoscale.models.network import DinoNetwork
from dinoscale.models.zoo import build_backbone


def test_weights_are_bf16_and_statistics_of_batch_norm_float32() -> None:
    backbone = build_backbone("test_vit", img_size=32, patch_size=8)
    head = DinoHead(
        backbone.embed_dim,
        num_prototypes=8,
        hidden_dim=8,
        bottleneck_dim=4,
        num_layers=2,
        norm_last_layer=True,
        batch_norm=True,
    )
    network = DinoNetwork(backbone, head).requires_grad_(False)
    layout = end_to_end([list(network.named_parameters())], 1)
    teacher = Replicated(network, layout, torch.bfloat16)
    plain = teacher.plain(lambda whole: whole)
    assert {value.dtype for value in plain.parameters()} == {torch.bfloat16}
    statistics = {name: value for name, value in teacher.buffers.items() if "running" in name}
    assert statistics
    assert {value.dtype for value in statistics.values()} == {torch.float32}


def test_micro_batches_share_one_copy_of_gathered_prototypes() -> None:
    units, seen = torch.ones(2, 3), list[Seen]()
    for _ in range(3):
        of_classes, of_patches = torch.ones(4, 3), torch.full((5, 3), 2.0)
        seen.append(Seen(copies=True, earlier=seen[0] if seen else None))
        seen[-1].of_prototypes(units, None, of_classes, torch.ones(4, 1))
        seen[-1].of_prototypes(None, units, of_patches, None)
        of_classes.zero_()  # ZeRO releases them after the forward
        of_patches.zero_()
    patches = [some.patches for some in seen]
    assert len({some.classes.weight_v.data_ptr() for some in seen}) == 1
    assert len({some.weight_v.data_ptr() for some in patches if some is not None}) == 1
    assert torch.equal(seen[2].classes.weight_v, torch.ones(4, 3))
    assert patches[2] is not None
    assert torch.equal(patches[2].weight_v, torch.full((5, 3), 2.0))
