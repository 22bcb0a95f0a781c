"""Settings of the objectives beside the class tokens' own.

Source: code of Oquab et al. 2023 (arXiv:2304.07193); Zhou et al. 2021 (arXiv:2111.07832) for masked
patches, Sablayrolles et al. 2018 (arXiv:1806.03198) for KoLeo; code of Simeoni et al. 2025
(arXiv:2508.10104) for Gram; [D] ours.
"""

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dinoscale.config.sections.fields import (
    Count,
    CountOrZero,
    Fraction,
    Pair,
    PathText,
    PositiveOrZero,
    Section,
)

_LEAST_SIDE = 4  # patches; a mask is made of rectangles of 4 or more, smaller than the crop


class IbotConfig(Section):
    """Patch tokens of masked global crops learn the teacher's, which sees the whole crops."""

    loss_weight: PositiveOrZero = Field(
        default=0.0, description="Weight of the patch loss; 0: none, and nothing is masked."
    )
    mask_prob: Fraction = Field(
        default=0.5, gt=0, description="Share of the global crops that are masked."
    )
    mask_ratio: Pair = Field(
        default=(0.1, 0.5), description="Share of the patches of such a crop, lowest and highest."
    )
    mask_rule: Literal["dinov2", "dinov3"] = Field(
        default="dinov3",
        description="dinov2: the number of masked patches of a crop is random. dinov3: it is "
        "exact, so that all micro-batches have the same number and shapes never change.",
    )
    mask_group: Count = Field(
        default=8,
        description="Images whose global crops share out the ratios evenly; the micro-batch is a "
        "multiple of it, so that masks do not depend on the ranks. [D].",
    )

    @field_validator("mask_ratio")
    @classmethod
    def _ratio_ordered(cls, ratio: tuple[float, float]) -> tuple[float, float]:
        low, high = ratio
        if not 0 <= low < high <= 1:
            raise ValueError(f"need 0 <= low < high <= 1, got {low}, {high}")
        return ratio

    @model_validator(mode="after")
    def _masks_a_crop(self) -> "IbotConfig":
        if not self.masked_crops:
            crops = 2 * self.mask_group
            raise ValueError(
                f"mask_prob: {self.mask_prob} of the {crops} global crops of {self.mask_group} "
                f"images (ibot.mask_group) is not one crop; need at least {_up(1 / crops)}"
            )
        return self

    @property
    def masked_crops(self) -> int:
        """Masked global crops of a group of images, of which there are two per image."""
        return int(2 * self.mask_group * self.mask_prob)

    @property
    def masked_share(self) -> float:
        """Share of the global crops that are masked: `mask_prob` in whole crops of a group."""
        return self.masked_crops / (2 * self.mask_group)

    def mistakes(self, *, size: int, patch_size: int) -> list[str]:
        """Masks that global crops of this size in pixels cannot have."""
        side = size // patch_size
        if side < _LEAST_SIDE:
            return [
                f"crops.global_size: {size} px are {side} x {side} patches of {patch_size} px, "
                f"which are too few to mask; need at least {_LEAST_SIDE * patch_size} px, or "
                "ibot.loss_weight=0.0"
            ]
        low, high = self.mask_ratio
        share, crop, end = low + (high - low) / self.masked_crops, "least", "lower"
        if self.mask_rule == "dinov2":  # some crops may have no masked patch, but not all of them
            share, crop, end = high, "most", "upper"
        if int(side**2 * share):
            return []
        return [
            f"ibot.mask_ratio: {share:.3g} of {side**2} patches, in the {crop} masked global crop, "
            f"is not one patch; raise the {end} end to at least {_up(1 / side**2)}"
        ]


def _up(fraction: float) -> float:
    """Rounded up to three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(fraction)) - 2)
    return round(math.ceil(fraction / unit) * unit, 12)


class KoleoConfig(Section):
    """Class tokens of different images are kept apart: the Kozachenko-Leonenko regularizer."""

    loss_weight: PositiveOrZero = Field(
        default=0.0, description="Weight of the sum over both global views; 0.1 in DINOv2."
    )
    scope: Literal["rank", "all", "group"] = Field(
        default="rank",
        description="Whose images of a pass are neighbours: of the same rank, as in DINOv2's code, "
        "so that results depend on the ranks; of all ranks; or of the same group of group_size "
        "images on neighbouring ranks, as in DINOv3's high-resolution phase.",
    )
    group_size: Count | None = Field(
        default=None, description="Images of a group, with scope group. 16 in DINOv3."
    )
    num_neighbours: Count = Field(
        default=1, description="Nearest neighbours whose distances count, equally."
    )

    @model_validator(mode="after")
    def _groups_have_a_size(self) -> "KoleoConfig":
        if self.scope != "group":
            if self.group_size is not None:
                raise ValueError(
                    f"group_size: {self.group_size} is of koleo.scope=group, got {self.scope!r}"
                )
        elif self.group_size is None:
            raise ValueError("group_size: is missing, with koleo.scope=group; 16 in DINOv3")
        elif self.group_size <= self.num_neighbours:
            raise ValueError(
                f"group_size: {self.group_size} images have too few neighbours, need at least "
                f"{self.num_neighbours + 1} for koleo.num_neighbours={self.num_neighbours}"
            )
        return self


class AnchorConfig(Section):
    """Features of the student stay near those of the network as the run began, the anchor.

    Each term is the mean of 1 - cosine over the global crops that ibot.* does not choose to mask,
    and 0 in the first step, in bf16 up to its rounding. The anchor sees these crops as the student
    does, with its stochastic depth and its changes of rotary coordinates.
    """

    class_weight: PositiveOrZero = Field(
        default=0.0,
        description="Weight of the distances of class tokens after the final norm; 0: none. The "
        "anchor begins as train.init_from, or as that of train.continue_from, else as that run's "
        "student; then it is in the checkpoints. [D].",
    )
    patch_weight: PositiveOrZero = Field(
        default=0.0,
        description="Weight of the distances of patch tokens, a mean over patches; 0: none. With "
        "both 0 there is no anchor. [D].",
    )

    @property
    def counts(self) -> bool:
        """Whether there is an anchor."""
        return bool(self.class_weight or self.patch_weight)

    @property
    def weights(self) -> dict[str, float]:
        """Those that are not 0, by key."""
        found = {"class_weight": self.class_weight, "patch_weight": self.patch_weight}
        return {f"anchor.{key}": weight for key, weight in found.items() if weight}

    def mistakes(self, *, begins_random: bool, masked_share: float) -> list[str]:
        """What does not go together.

        Args:
            begins_random: whether the run begins with random weights.
            masked_share: share of the global crops that are masked.
        """
        mistakes = []
        if begins_random:
            mistakes.append(
                "the run begins with random weights, near which nothing should stay; give "
                "train.init_from or train.continue_from, or set it to 0.0"
            )
        if masked_share == 1:
            mistakes.append(
                "the anchor looks at global crops that are not masked, and ibot.mask_prob masks "
                "all of them; lower that, or set it to 0.0"
            )
        return [f"{key}: {text}" for key in self.weights for text in mistakes]


class GramConfig(Section):
    """Gram anchoring: similarities of the student's patches follow those of an earlier teacher.

    That one, the Gram network, is a frozen backbone. Steps count from the start of the run.
    """

    loss_weight: PositiveOrZero = Field(
        default=0.0,
        description="Weight of the Gram loss in steps that have a Gram network; 0: no such loss, "
        "and no network. 1 or 2 in DINOv3.",
    )
    teacher: PathText | None = Field(
        default=None,
        description="Weights of the Gram network, of the kinds that train.init_from reads; null: "
        "the Gram network of train.continue_from, else the EMA teacher at the first refresh, and "
        "no loss before. Read once; then they are in the checkpoints.",
    )
    refresh_every_steps: Count | None = Field(
        default=None,
        description="The EMA teacher overwrites the Gram network after every so many steps, "
        "skipped ones included; null: never. 10000 in DINOv3.",
    )
    first_refresh_step: CountOrZero = Field(
        default=0, description="Not before so many steps are done."
    )
    max_refreshes: Count | None = Field(
        default=None, description="At most so often; null: to the end. 3 in DINOv3."
    )
    crop_size: Count | None = Field(
        default=None,
        description="Side in pixels of what the Gram network sees of each global crop, of the same "
        "box and flip; its features are resized to the student's. null: as large. Twice as large "
        "in DINOv3.",
    )
    crop_colors: bool = Field(
        default=False,
        description="Whether these crops have the colors, blur and solarization of the global "
        "crop; not so in DINOv3's recipes.",
    )
    tokens: Literal["all", "masked", "unmasked"] = Field(
        default="all", description="Which patches are compared: all as in DINOv3's recipes."
    )
    compare: Literal["within_crops", "across_crops"] = Field(
        default="within_crops",
        description="Whether patches are compared with those of their own crop, as in DINOv3's "
        "recipes, or with those of all global crops of a micro-batch.",
    )
    negatives: Literal["kept", "removed", "removed_from_target"] = Field(
        default="kept",
        description="Whether negative similarities count as 0, those of the Gram network alone or "
        "both. Kept in DINOv3's recipes.",
    )

    @property
    def steps_without(self) -> int | None:
        """Steps before there is a Gram network; None if there never is one."""
        if self.teacher is not None:
            return 0
        every = self.refresh_every_steps
        return None if every is None else max(-(-self.first_refresh_step // every), 1) * every

    def mistakes(self, *, masks: bool, continues: bool) -> list[str]:
        """What does not go together.

        Args:
            masks: whether patches are masked.
            continues: whether the state of another run, perhaps a Gram network in it, is given.
        """
        mistakes = []
        if self.steps_without is None and not continues:
            mistakes.append(
                "gram.teacher: there is nothing to compare with; give weights, or let the EMA "
                "teacher be taken over with gram.refresh_every_steps"
            )
        if self.refresh_every_steps is None:
            mistakes += [
                f"gram.{key}: {getattr(self, key)} without gram.refresh_every_steps; set that, or "
                f"leave {key} out"
                for key in ("first_refresh_step", "max_refreshes")
                if getattr(self, key)
            ]
        if self.tokens != "all" and not masks:
            mistakes.append(
                f"gram.tokens: '{self.tokens}' needs masks, and ibot.loss_weight is 0; set it to "
                "'all'"
            )
        if self.tokens != "all" and self.compare == "within_crops":
            mistakes.append(
                f"gram.tokens: '{self.tokens}' patches are compared across crops only, as some "
                "crops have none; set gram.compare=across_crops, or gram.tokens=all"
            )
        return mistakes
