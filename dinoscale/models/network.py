"""Backbone and head as one module, which the engine trains and the teacher averages."""

from collections.abc import Sequence

from torch import Tensor, nn

from dinoscale.models.heads import DinoHead, Objective
from dinoscale.models.resnet import ResNet50
from dinoscale.models.vit import VisionTransformer


class DinoNetwork(nn.Module):
    """Crops to prototype logits; parameters are named backbone.* and head.*."""

    backbone: VisionTransformer | ResNet50
    head: DinoHead

    def __init__(self, backbone: VisionTransformer | ResNet50, head: DinoHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self,
        crops: Sequence[Tensor],
        keep: Tensor | None = None,
        objective: Objective | None = None,
    ) -> Tensor:
        """Return the logits of all crops, or the objective's scalar.

        Args:
            crops: tensors (N_i, C, H_i, W_i), normalised pixels.
            keep: stochastic depth multipliers (depth, 2, sum N_i), or None.
            objective: maps unit vectors (sum N_i, D) and the prototypes to a scalar.

        Returns:
            (sum N_i, K), rows in the order of `crops`; with an objective, its scalar.
        """
        result: Tensor = self.head(self.backbone(crops, keep), objective)
        return result
