"""Settings of the objectives beside the class tokens' own.

Source: code of Oquab et al. 2023 (arXiv:2304.07193); Zhou et al. 2021 (arXiv:2111.07832) for masked
patches, Sablayrolles et al. 2018 (arXiv:1806.03198) for KoLeo; [D] ours.
"""

from typing import Literal

from pydantic import Field, field_validator

from dinoscale.config.fields import Count, Fraction, Pair, PositiveOrZero, Section


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


class KoleoConfig(Section):
    """Class tokens of different images are kept apart: the Kozachenko-Leonenko regularizer."""

    loss_weight: PositiveOrZero = Field(
        default=0.0, description="Weight of the sum over both global views; 0.1 in DINOv2."
    )
