"""What the replicated teacher holds in the compute dtype, and what it does not."""

import torch

from dinoscale.engine.shards import end_to_end
from dinoscale.engine.teacher import _Replicated
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
    teacher = _Replicated(network, layout, torch.bfloat16)
    plain = teacher.plain_network()
    assert {value.dtype for value in plain.parameters()} == {torch.bfloat16}
    statistics = {name: value for name, value in teacher.buffers.items() if "running" in name}
    assert statistics
    assert {value.dtype for value in statistics.values()} == {torch.float32}
