"""Settings of the crops and of their augmentation.

Sources: [C] code of Caron et al. 2021 (arXiv:2104.14294), its command-line defaults; [P] the paper.
"""

from pydantic import Field, field_validator

from dinoscale.config.sections.fields import (
    Count,
    CountOrZero,
    Fraction,
    Pair,
    PositiveOrZero,
    Section,
    ThreeFractions,
)


class CropsConfig(Section):
    """Multi-crop geometry: sizes in pixels, scales as a fraction of the image area.

    There are always two global crops.
    """

    global_size: Count = Field(
        default=224, description="Side of a global crop in pixels. Source: [C]."
    )
    global_scale: Pair = Field(
        default=(0.4, 1.0), description="Area of a global crop. Source: [C]."
    )
    local_size: Count = Field(
        default=96, description="Side of a local crop in pixels. Source: [C]."
    )
    local_scale: Pair = Field(default=(0.05, 0.4), description="Area of a local crop. Source: [C].")
    num_local: CountOrZero = Field(default=8, description="Local crops per image. Source: [C].")

    @field_validator("global_scale", "local_scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        low, high = scale
        if not 0 < low < high <= 1:
            raise ValueError(f"need 0 < low < high <= 1, got {low}, {high}")
        return scale


class AugmentConfig(Section):
    """Augmentation of a crop. Source of every value: [C], after BYOL ([P] section 3.2)."""

    flip_prob: Fraction = Field(default=0.5, description="Chance of a horizontal flip.")
    jitter_prob: Fraction = Field(
        default=0.8, description="Chance of color jitter, the four changes below."
    )
    brightness: PositiveOrZero = Field(default=0.4, description="Factor drawn from 1 +- this.")
    contrast: PositiveOrZero = Field(default=0.4, description="Factor drawn from 1 +- this.")
    saturation: PositiveOrZero = Field(default=0.2, description="Factor drawn from 1 +- this.")
    hue: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="Shift drawn from +- this, in turns of the color wheel.",
    )
    gray_prob: Fraction = Field(default=0.2, description="Chance of conversion to grayscale.")
    blur_probs: ThreeFractions = Field(
        default=(1.0, 0.1, 0.5), description="Chance of a Gaussian blur: global 1, global 2, local."
    )
    blur_radius: Pair = Field(
        default=(0.1, 2.0),
        description="Standard deviation of the blur in pixels, lowest and highest.",
    )
    solarize_probs: ThreeFractions = Field(
        default=(0.0, 0.2, 0.0), description="Chance of solarizing: global 1, global 2, local."
    )
    solarize_threshold: int = Field(
        default=128, ge=0, le=256, description="8-bit values from here up are inverted."
    )

    @field_validator("blur_radius")
    @classmethod
    def _radius_ordered(cls, radius: tuple[float, float]) -> tuple[float, float]:
        low, high = radius
        if not 0 <= low <= high:
            raise ValueError(f"need 0 <= low <= high, got {low}, {high}")
        return radius
