"""ResNet-50 with the forward signature of our ViT.

Source: He et al. 2016 (arXiv:1512.03385); Caron et al. 2021 (arXiv:2104.14294), table 2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinoscale.models.vit import group_by_resolution


class ResNet50(nn.Module):
    """ResNet-50 without its classifier: crops to pooled features.

    Parameter and buffer names are those of torchvision (`conv1`, `layer1.0.conv1`, ...).

    Attributes:
        embed_dim: D = 2048.
        depth: 0, as no block has stochastic depth.
        patch_size: 1, as any image size is valid.
        checkpoint_every, recompute: have no effect; activations are always stored.
        subset_rate: has no effect; there is no stochastic depth.
    """

    def __init__(self, source: Any) -> None:
        """Adopt the layers of a torchvision `resnet50`."""
        super().__init__()
        self.embed_dim: int = source.fc.in_features
        self.depth = 0
        self.patch_size = 1
        self.checkpoint_every = 0
        self.recompute = "block"
        self.subset_rate = 0.0
        for name, child in source.named_children():
            if name != "fc":
                self.add_module(name, child)

    def forward(self, crops: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """Return pooled features; batch norm sees one resolution at a time.

        Args:
            crops: tensors (N_i, C, H_i, W_i), normalised pixels.
            keep: None; a convolutional network has no stochastic depth here.

        Returns:
            (sum N_i, 2048), rows in the order of `crops`.

        Raises:
            ValueError: `keep` is given, or there are no crops.
        """
        if keep is not None:
            raise ValueError("ResNet-50 has no stochastic depth: keep must be None")
        rows = []
        for x in group_by_resolution(crops):
            for layer in self.children():
                x = layer(x)
            rows.append(x.flatten(1))
        return torch.cat(rows)
