from typing import Any

import torch
from torch import Tensor

from dinoscale.models.heads import DinoHead
from dinoscale.models.network import DinoNetwork, TokenNetwork
from dinoscale.models.stochastic_depth import stochastic_depth_keep
from dinoscale.models.zoo import build_backbone


def _network() -> DinoNetwork:
    torch.manual_seed(0)
    backbone = build_backbone(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        mask_token=True,
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
    return DinoNetwork(backbone, head)


def test_network_is_the_head_after_the_backbone() -> None:
    network = _network()
    backbone, head = network.backbone, network.head
    assert {name.split(".")[0] for name in network.state_dict()} == {"backbone", "head"}
    crops = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)]
    keep = stochastic_depth_keep(torch.rand(2, 2, 10), drop_path_rate=0.5)
    logits = network(crops, keep)
    assert logits.shape == (10, 11)
    assert torch.equal(logits, head(backbone(crops, keep)))
    assert not torch.equal(logits, network(crops))


class _Kept:
    """An objective that keeps what it is shown, each part a power of ten."""

    def __init__(self, *, wants_patches: bool) -> None:
        self.wants_patches = wants_patches
        self.shown: dict[str, Any] = {}

    def of_class_tokens(self, tokens: Tensor) -> Tensor:
        self.shown["tokens"] = tokens
        return tokens.new_tensor(1.0)

    def of_patches(self, tokens: Tensor) -> Tensor:
        self.shown["every"] = tokens
        return tokens.new_tensor(10.0)

    def of_prototypes(self, classes: Any, patches: Any, *_: Any) -> Tensor:
        self.shown |= {"classes": classes, "patches": patches}
        return classes.new_tensor(100.0)


def test_all_patches_are_shown_where_wanted_and_change_nothing_else() -> None:
    network, images = _network(), torch.randn(2, 3, 32, 32)
    crops = [images, torch.randn(6, 3, 16, 16)]
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[1, 3:7] = True
    rows = masks.flatten().nonzero().flatten()
    kept = [_Kept(wants_patches=wanted) for wanted in (False, True)]
    totals = [float(network(crops, None, some, masks, rows)) for some in kept]
    assert totals == [101, 111]
    assert "every" not in kept[0].shown
    for name, shown in kept[0].shown.items():
        torch.testing.assert_close(shown, kept[1].shown[name])
    _, patches = network.backbone([images], masks=masks, all_patches=True)
    torch.testing.assert_close(kept[1].shown["every"], patches)
    tokens, unmasked = TokenNetwork(network.backbone)(images)
    features = network.backbone.features(images)
    torch.testing.assert_close(tokens, features[:, 0])
    torch.testing.assert_close(unmasked, features[:, 1:])
    assert network(crops, None, _Kept(wants_patches=True), None, None) == 111
