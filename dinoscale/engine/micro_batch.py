"""A micro-batch: its crops, its targets, and its loss, a weighted sum of leaves of `losses/`.

    L = w_dino DINO + w_ibot iBOT + w_koleo sum over both views of KoLeo + w_gram Gram
        + w_class Anchor of class tokens + w_patch Anchor of patches
        + v_class Features of class tokens + v_patch Features of patches

DINO's terms of local crops have a scheduled weight besides. The anchor's terms, and those of
features that follow a frozen teacher's, are means over the global crops that are not chosen to be
masked, the same number in each group of images, whatever the split into micro-batches: masked ones
are other pictures than these networks see. With neither DINO nor iBOT there are no heads.

It is computed inside the student's forward, where ZeRO has gathered the prototypes, so all terms
come out of one engine forward. Shape letters as in `engine/step.py`; M masked patches.
Source: Caron et al. 2021 (arXiv:2104.14294); Oquab et al. 2023 (arXiv:2304.07193); Simeoni et al.
2025 (arXiv:2508.10104).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dinoscale.data.augmentation.masks import Masks
from dinoscale.losses.anchor import anchor_distances
from dinoscale.losses.dino import dino_loss_of_prototypes
from dinoscale.losses.features import FeatureLoss, feature_distances
from dinoscale.losses.gram import Negatives, gram_loss
from dinoscale.losses.ibot import PatchTargets, patch_loss_of_prototypes
from dinoscale.losses.koleo import koleo_loss
from dinoscale.runtime import distributed


class StoredTargets(NamedTuple):
    """What a frozen teacher found in the global crops of a micro-batch before the run.

    Attributes:
        classes: of heads the unit vectors of class tokens, (2 * B, bottleneck) float32; without
            them class features (2 * B, D').
        patches: of heads those of the chosen patches (M, bottleneck); without them all patch
            features on the student's grid (2 * B, P, D'); None where they do not count.
    """

    classes: Tensor
    patches: Tensor | None


@dataclass(frozen=True)
class MicroBatch:
    """The crops of one forward and backward pass on one rank.

    Attributes:
        global_crops: normalised images (2, B, C, H, W) float32.
        local_crops: normalised images (n, B, C, h, w) float32; n may be 0.
        keep: stochastic depth multipliers (depth, 2, S * B) float32, crop-major, or None.
        masks: patches of the global crops that the student does not see, or None.
        coordinates: changes of the student's rotary coordinates (2, depth, 5), of global and of
            local crops, or None.
        gram_crops: what the Gram network sees in place of the global crops, float32
            (2, B, C, G, G), or None.
        stored: what a frozen teacher found in them before the run, or None.
    """

    global_crops: Tensor
    local_crops: Tensor
    keep: Tensor | None
    masks: Masks | None = None
    coordinates: Tensor | None = None
    gram_crops: Tensor | None = None
    stored: StoredTargets | None = None


@dataclass(frozen=True)
class AnchorTargets:
    """What the anchor finds in the global crops, through the final norm.

    Attributes:
        classes: class tokens (2 * B, D).
        patches: patch tokens (2 * B, P, D).
    """

    classes: Tensor
    patches: Tensor


@dataclass(frozen=True)
class FeatureTargets:
    """What a frozen teacher of another width finds in the global crops, through its final norm.

    Attributes:
        classes: class tokens, or pooled features (2 * B, D').
        patches: patch tokens on the student's grid (2 * B, P, D'); None where they do not count.
    """

    classes: Tensor
    patches: Tensor | None


@dataclass(frozen=True)
class Targets:
    """What the teacher gives the student of one micro-batch.

    Attributes:
        class_probs: of the global crops' class tokens (2, B, K) float32; K is 0 without heads.
        patches: from which those of the masked patches are computed; None without masks.
        gram: patch features of the Gram network on the student's grid (2 * B, P, D); None without
            one, and in steps whose Gram weight is 0.
        anchor: features of the anchor; None without one.
        features: those of a frozen teacher that the student's follow; None without one.
    """

    class_probs: Tensor
    patches: PatchTargets | None = None
    gram: Tensor | None = None
    anchor: AnchorTargets | None = None
    features: FeatureTargets | None = None


@dataclass(frozen=True)
class LossWeights:
    """The temperature of the student, and the weight of each term, 0 for none.

    Attributes:
        local_is_scheduled: whether the step's `local_weight` may differ from 1.
        same_view_pairs: whether DINO compares a global crop with itself, too.
        koleo_over_ranks: look for neighbours among the images of all ranks.
        koleo_group: of these, only among so many in a row; None for all.
        koleo_neighbours: how many of them count.
        gram: of the steps that have a Gram network.
        gram_per_crop: whether patches are compared within crops, else across those of a pass.
        gram_negatives: as in `gram_loss`.
        gram_tokens: which patches are compared.
        anchor_class: of the anchor's distances of class tokens.
        anchor_patch: of those of patches.
        feature_class: of the distances to a frozen teacher's class features.
        feature_patch: of those to its patch features.
        feature_loss: which distance.
        unmasked_share: share of the global crops that are not chosen to be masked, above 0.
    """

    student_temp: float
    dino: float = 1.0
    ibot: float = 0.0
    koleo: float = 0.0
    local_is_scheduled: bool = False
    same_view_pairs: bool = False
    koleo_over_ranks: bool = False
    koleo_group: int | None = None
    koleo_neighbours: int = 1
    gram: float = 0.0
    gram_per_crop: bool = True
    gram_negatives: Negatives = "kept"
    gram_tokens: Literal["all", "masked", "unmasked"] = "all"
    anchor_class: float = 0.0
    anchor_patch: float = 0.0
    feature_class: float = 0.0
    feature_patch: float = 0.0
    feature_loss: FeatureLoss = "cosine"
    unmasked_share: float = 1.0

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of what `MicroBatchLoss.terms` holds beside the sum, in order."""
        others = (
            *(self.ibot, self.koleo, self.gram, self.anchor_class, self.anchor_patch),
            *(self.feature_class, self.feature_patch),
        )
        names, has_heads = [], self.dino or self.ibot
        if has_heads and (any(others) or self.dino != 1 or self.local_is_scheduled):
            names += ["dino_loss", "dino_global_loss"]
        if self.ibot:
            names += ["ibot_loss", "patch_entropy"]
        if self.koleo:
            names += ["koleo_loss", "koleo_distance"]
        if self.gram:
            names += ["gram_loss"]
        if self.anchor_class:
            names += ["anchor_class_loss"]
        if self.anchor_patch:
            names += ["anchor_patch_loss"]
        if self.feature_class:
            names += ["class_feature_loss"]
        if self.feature_patch:
            names += ["patch_feature_loss"]
        return tuple(names)


class MicroBatchLoss:
    """The objective that the student's network computes, see `models.network.Objective`.

    Attributes:
        terms: after the forward, scalars without gradient by name: each term before its weight;
            `dino_global_loss`, the part of `dino_loss` between two global crops, so that the rest
            is that of local crops, before its weight, too; `patch_entropy`, the mean of the patch
            targets' entropies in nats; `koleo_distance`, the mean distance to the nearest class
            tokens; `gram_loss`, 0 until there is a Gram network and while its weight is 0;
            `anchor_class_loss` and `anchor_patch_loss`; `class_feature_loss` and
            `patch_feature_loss`.
        patch_target_sum: after the forward, sum of the patch targets (K,); None without masks.
    """

    def __init__(
        self,
        targets: Targets,
        weights: LossWeights,
        *,
        masks: Masks | None = None,
        local_weight: float = 1.0,
        gram_weight: float = 1.0,
    ) -> None:
        """Take the targets of a micro-batch.

        Args:
            targets: of the micro-batch.
            weights: of the terms.
            masks: of the micro-batch.
            local_weight: of DINO's terms of local crops, within DINO's own weight.
            gram_weight: of Gram, within its own weight.
        """
        self._targets, self._weights, self._masks = targets, weights, masks
        self._local_weight, self._gram_weight = local_weight, gram_weight
        self.wants_features = targets.features is not None
        self.wants_patches = (
            targets.gram is not None or weights.anchor_patch > 0 or weights.feature_patch > 0
        )
        self.terms: dict[str, Tensor] = {}
        if weights.gram:
            self.terms["gram_loss"] = targets.class_probs.new_zeros(())
        self.patch_target_sum: Tensor | None = None

    def of_prototypes(
        self,
        classes: Tensor | None,
        patches: Tensor | None,
        weight_v: Tensor,
        weight_g: Tensor | None,
        plain: bool = False,
    ) -> Tensor:
        """DINO of class tokens (S * B, D), iBOT of masked patches (M, D), or both; weighted."""
        parts = []
        if classes is not None:
            parts.append(self._weights.dino * self._dino(classes, weight_v, weight_g, plain))
        if patches is not None:
            parts.append(self._weights.ibot * self._ibot(patches, weight_v, weight_g, plain))
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def of_class_tokens(self, tokens: Tensor) -> Tensor | None:
        """KoLeo and anchor of the global crops among the class tokens (S * B, D), weighted."""
        parts = []
        if self._weights.koleo:
            parts.append(self._koleo(tokens))
        if self._weights.anchor_class:
            assert self._targets.anchor is not None
            target = self._targets.anchor.classes
            loss = self._anchor("anchor_class_loss", tokens[: len(target)], target)
            parts.append(self._weights.anchor_class * loss)
        return sum(parts[1:], parts[0]) if parts else None

    def of_patches(self, tokens: Tensor) -> Tensor | None:
        """Gram and anchor of the global crops' patch tokens (2 * B, P, D), weighted."""
        parts = []
        if self._targets.gram is not None:
            parts.append(self._gram(tokens, self._targets.gram))
        if self._weights.anchor_patch:
            assert self._targets.anchor is not None
            loss = self._anchor("anchor_patch_loss", tokens, self._targets.anchor.patches)
            parts.append(self._weights.anchor_patch * loss)
        return sum(parts[1:], parts[0]) if parts else None

    def of_features(self, classes: Tensor | None, patches: Tensor | None) -> Tensor:
        """Features (2 * B, D') and (2 * B, P, D') of the global crops after the maps, weighted."""
        targets, weights = self._targets.features, self._weights
        assert targets is not None
        total = targets.classes.new_zeros((), dtype=torch.float32)
        for name, weight, own, target in (
            ("class_feature_loss", weights.feature_class, classes, targets.classes),
            ("patch_feature_loss", weights.feature_patch, patches, targets.patches),
        ):
            if weight:
                assert own is not None
                assert target is not None
                distances = feature_distances(own, target, kind=weights.feature_loss)
                total = total + weight * self._of_unmasked(name, distances)
        return total

    def _koleo(self, tokens: Tensor) -> Tensor:
        views, images = self._targets.class_probs.shape[:2]
        of_views = tokens[: views * images].unflatten(0, (views, images))
        weights = self._weights
        # Groups that are whole on every rank need nobody else's images.
        alone = weights.koleo_group is not None and images % weights.koleo_group == 0
        over_ranks = weights.koleo_over_ranks and not alone
        loss, distance = koleo_loss(
            of_views,
            gather=_over_ranks if over_ranks else None,
            first=distributed.rank() * images if over_ranks else 0,
            group_size=weights.koleo_group,
            num_neighbours=weights.koleo_neighbours,
        )
        self.terms |= {"koleo_loss": loss.detach(), "koleo_distance": distance}
        return weights.koleo * loss

    def _gram(self, tokens: Tensor, target: Tensor) -> Tensor:
        """Gram of all patches, masked ones included, weighted."""
        loss = gram_loss(
            tokens,
            target,
            per_crop=self._weights.gram_per_crop,
            negatives=self._weights.gram_negatives,
            chosen=self._gram_patches(),
        )
        self.terms["gram_loss"] = loss.detach()
        return self._gram_weight * self._weights.gram * loss

    def _gram_patches(self) -> Tensor | None:
        """Which patches count, bool (2 * B, P); None for all."""
        if self._weights.gram_tokens == "all":
            return None
        assert self._masks is not None
        masked = self._masks.masks
        return masked if self._weights.gram_tokens == "masked" else ~masked

    def _anchor(self, name: str, tokens: Tensor, target: Tensor) -> Tensor:
        return self._of_unmasked(name, anchor_distances(tokens, target))

    def _of_unmasked(self, name: str, distances: Tensor) -> Tensor:
        """Mean of (2 * B,) over the global crops that are not chosen to be masked, by its name."""
        if self._masks is not None:
            distances = distances.masked_fill(self._masks.chosen, 0.0)
        # By their number, which is the recipe's share of any whole groups.
        loss = distances.sum() / (len(distances) * self._weights.unmasked_share)
        self.terms[name] = loss.detach()
        return loss

    def _dino(self, x: Tensor, weight_v: Tensor, weight_g: Tensor | None, plain: bool) -> Tensor:
        loss, unweighted, of_global = dino_loss_of_prototypes(
            x,
            weight_v,
            weight_g,
            plain,
            teacher_probs=self._targets.class_probs,
            student_temp=self._weights.student_temp,
            local_weight=self._local_weight,
            same_view=self._weights.same_view_pairs,
        )
        self.terms |= {"dino_loss": unweighted, "dino_global_loss": of_global}
        return loss

    def _ibot(self, x: Tensor, weight_v: Tensor, weight_g: Tensor | None, plain: bool) -> Tensor:
        assert self._targets.patches is not None
        assert self._masks is not None
        loss, entropy, target_sum = patch_loss_of_prototypes(
            x,
            weight_v,
            weight_g,
            plain,
            targets=self._targets.patches,
            weights=self._masks.weights,
            student_temp=self._weights.student_temp,
        )
        views, images = self._targets.class_probs.shape[:2]
        loss = loss / (views * images)  # a mean over all global crops, masked or not
        self.terms |= {"ibot_loss": loss.detach(), "patch_entropy": entropy / max(len(x), 1)}
        self.patch_target_sum = target_sum
        return loss


def _over_ranks(of_views: Tensor) -> Tensor:
    """Class tokens (V, B, D) of this rank -> (V, W * B, D) of all."""
    return distributed.gather_with_gradient(of_views.transpose(0, 1)).transpose(0, 1)
