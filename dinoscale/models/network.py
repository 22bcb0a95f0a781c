"""Backbone and heads as one module, which the engine trains and the teacher averages.

Shape letters: N images of all crops, M masked patches, D width of the backbone, K prototypes.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dinoscale.models.convnet import ConvNet
from dinoscale.models.heads import DinoHead
from dinoscale.models.vit import VisionTransformer

MAPS = ("class_map.", "patch_map.")  # how the tensors of maps begin, see `DinoNetwork`


class Objective(Protocol):
    """What is computed inside the network's forward, where ZeRO has gathered its weights.

    The parts are scalars, and their sum is the network's result.

    Attributes:
        wants_patches: whether all patch tokens are computed.
        wants_features: whether `of_features` is called, if the network has maps.
    """

    wants_patches: bool
    wants_features: bool

    def of_class_tokens(self, tokens: Tensor) -> Tensor | None:
        """The part of class tokens (N, D) after the final norm, before the head; None for none."""
        ...

    def of_patches(self, tokens: Tensor) -> Tensor | None:
        """The part of all patch tokens of the first crops (N_0, P, D) after the final norm."""
        ...

    def of_features(self, classes: Tensor | None, patches: Tensor | None) -> Tensor:
        """The part of the first crops' features after the maps, None without a map.

        Args:
            classes: class tokens (N_0, D') of the first crops.
            patches: all their patch tokens (N_0, P, D').
        """
        ...

    def of_prototypes(
        self,
        classes: Tensor | None,
        patches: Tensor | None,
        weight_v: Tensor,
        weight_g: Tensor | None,
        plain: bool = False,
    ) -> Tensor:
        """The part of the tokens that meet these prototypes.

        Args:
            classes: unit vectors of the class tokens (N, bottleneck); None where they have another
                head.
            patches: those of the masked patches (M, bottleneck); None likewise, or without masks.
            weight_v: v, (K, bottleneck).
            weight_g: g, (K, 1), or None for ones.
            plain: the prototypes are v; else g_k v_k / ||v_k||.
        """
        ...


class DinoNetwork(nn.Module):
    """Crops to prototype logits; parameters are named backbone.*, head.* and patch_head.*.

    Linear maps to the width of another network's features, if there are any, are class_map.* and
    patch_map.*.
    """

    backbone: VisionTransformer | ConvNet
    head: DinoHead | None
    patch_head: DinoHead | None
    class_map: nn.Linear | None
    patch_map: nn.Linear | None

    def __init__(
        self,
        backbone: VisionTransformer | ConvNet,
        head: DinoHead | None,
        patch_head: DinoHead | None = None,
        class_map: nn.Linear | None = None,
        patch_map: nn.Linear | None = None,
    ) -> None:
        """Join them; without `patch_head`, patch tokens share `head`, if there is one."""
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.patch_head = patch_head
        self.class_map = class_map
        self.patch_map = patch_map

    def forward(
        self,
        crops: Sequence[Tensor],
        keep: Tensor | None = None,
        objective: Objective | None = None,
        masks: Tensor | None = None,
        patch_rows: Tensor | None = None,
        coordinates: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of all crops, or the objective's scalar.

        Args:
            crops: tensors (N_i, C, H_i, W_i), normalised pixels, global crops first.
            keep: stochastic depth multipliers (depth, 2, sum N_i), or None.
            objective: maps what the network computes to a scalar.
            masks: bool (N_0, P), patches of the first crops that are hidden from the network.
            patch_rows: int64 (M,), patches among the N_0 * P whose tokens the objective wants.
            coordinates: changes of rotary coordinates (resolutions, depth, 5), or None.

        Returns:
            (sum N_i, K), rows in the order of `crops`; with an objective, its scalar.
        """
        if objective is None:
            assert self.head is not None
            logits: Tensor = self.head(self.backbone(crops, keep))
            return logits
        options = {} if coordinates is None else {"coordinates": coordinates}
        patches = of_patches = every = None
        if objective.wants_patches:
            tokens, every = self.backbone(crops, keep, masks=masks, all_patches=True, **options)
            of_patches = objective.of_patches(every)
            if patch_rows is not None:
                patches = every.flatten(0, 1).index_select(0, patch_rows)
        elif patch_rows is None:
            tokens = self.backbone(crops, keep, **options)
        else:
            tokens, patches = self.backbone(
                crops, keep, masks=masks, patch_rows=patch_rows, **options
            )
        parts = [
            *self._of_heads(tokens, patches, objective),
            objective.of_class_tokens(tokens),
            of_patches,
            self._of_maps(tokens[: len(crops[0])], every, objective),
        ]
        first, *others = [part for part in parts if part is not None] or [tokens.new_zeros(())]
        return sum(others, first)

    def _of_maps(self, tokens: Tensor, every: Tensor | None, objective: Objective) -> Tensor | None:
        """The objective's part of the first crops' features; None without maps."""
        if (self.class_map is None and self.patch_map is None) or not objective.wants_features:
            return None
        classes = None if self.class_map is None else self.class_map(tokens)
        patches = None if self.patch_map is None else self.patch_map(every)
        return objective.of_features(classes, patches)

    def _of_heads(
        self, tokens: Tensor, patches: Tensor | None, objective: Objective
    ) -> list[Tensor]:
        """The objective's part of each head."""
        if self.head is None:
            return []
        if self.patch_head is not None and patches is not None:
            return [
                self.head.last_layer(
                    self.head.unit_vectors(tokens),
                    lambda x, *weights: objective.of_prototypes(x, None, *weights),
                ),
                self.patch_head.last_layer(
                    self.patch_head.unit_vectors(patches),
                    lambda y, *weights: objective.of_prototypes(None, y, *weights),
                ),
            ]
        n = len(tokens)

        def of_both(x: Tensor, v: Tensor, g: Tensor | None, plain: bool) -> Tensor:
            # Split here and not before: ZeRO-3 follows the backward pass through the layer's input.
            if patches is None:
                return objective.of_prototypes(x, None, v, g, plain)
            return objective.of_prototypes(x[:n], x[n:], v, g, plain)

        rows = tokens if patches is None else torch.cat((tokens, patches))
        return [self.head.last_layer(self.head.unit_vectors(rows), of_both)]


class TokenNetwork(nn.Module):
    """A backbone alone, for its tokens; parameters are named backbone.*, as in a run."""

    backbone: VisionTransformer

    def __init__(self, backbone: VisionTransformer) -> None:
        """Take the backbone."""
        super().__init__()
        self.backbone = backbone

    def forward(
        self, images: Tensor, keep: Tensor | None = None, coordinates: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Class tokens (N, D) and patch tokens (N, P, D) of images (N, C, H, W), normalised.

        `keep` and `coordinates` as in `VisionTransformer.forward`.
        """
        tokens, patches = self.backbone([images], keep, coordinates=coordinates, all_patches=True)
        return tokens, patches


class FeatureNetwork(nn.Module):
    """A backbone of any kind, for its features; parameters are named backbone.*."""

    backbone: VisionTransformer | ConvNet

    def __init__(self, backbone: VisionTransformer | ConvNet, *, patches: bool) -> None:
        """Take a backbone, and whether patch tokens are wanted, or the last map's places."""
        super().__init__()
        self.backbone = backbone
        self._patches = patches

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of images (N, C, H, W), normalised pixels, after the final norm.

        Returns:
            Class tokens, or pooled features (N, D); patch tokens, or the places of the last map
            (N, P, D), None if not wanted.
        """
        if not self._patches:
            return self.backbone([images]), None
        classes, patches = self.backbone([images], all_patches=True)
        return classes, patches
