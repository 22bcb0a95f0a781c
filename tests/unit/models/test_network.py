import torch

from dinoscale.models.heads import DinoHead
from dinoscale.models.network import DinoNetwork
from dinoscale.models.stochastic_depth import stochastic_depth_keep
from dinoscale.models.zoo import build_backbone


def test_network_is_the_head_after_the_backbone() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3
    )
    head = DinoHead(
        24,
        num_prototypes=11,
        hidden_dim=16,
        bottleneck_dim=8,
        num_layers=3,
        norm_last_layer=True,
        batch_norm=False,
    )
    network = DinoNetwork(backbone, head)
    assert {name.split(".")[0] for name in network.state_dict()} == {"backbone", "head"}
    crops = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)]
    keep = stochastic_depth_keep(torch.rand(2, 2, 10), drop_path_rate=0.5)
    logits = network(crops, keep)
    assert logits.shape == (10, 11)
    assert torch.equal(logits, head(backbone(crops, keep)))
    assert not torch.equal(logits, network(crops))
