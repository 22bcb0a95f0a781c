"""Settings of the crops and of their augmentation.

Sources: [C] code of Caron et al. 2021 (arXiv:2104.14294), its command-line defaults; [P] the paper;
Simeoni et al. 2025 (arXiv:2508.10104) for mixtures of sizes.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from dinoscale.config.sections.fields import (
    Count,
    CountOrZero,
    Fraction,
    Pair,
    Positive,
    PositiveOrZero,
    Section,
    ThreeFractions,
)

_ROUNDING = 1e-6  # of the sum of weights, which are written with few digits
_LARGEST = ("global_size", "local_size")  # settings that a mixture gives: its largest ones


class CropSizes(Section):
    """Sizes of the crops of a step, in pixels, and the share of the steps that have them."""

    weight: Positive = Field(description="Share of the steps.")
    global_size: Count = Field(description="As crops.global_size.")
    local_size: Count = Field(description="As crops.local_size.")
    gram_crop_size: Count | None = Field(default=None, description="As gram.crop_size.")


class CropsConfig(Section):
    """Multi-crop geometry: sizes in pixels, scales as a fraction of the image area.

    There are always two global crops.
    """

    global_size: Count = Field(
        default=224,
        description="Side of a global crop in pixels; with a mixture its largest one, for which "
        "learned positions are stored. Source: [C].",
    )
    global_scale: Pair = Field(
        default=(0.4, 1.0), description="Area of a global crop. Source: [C]."
    )
    local_size: Count = Field(
        default=96,
        description="Side of a local crop in pixels; with a mixture its largest one. Source: [C]. "
        "With rotary positions it need not be whole patches: the network leaves out the pixels "
        "right and below of the last whole one, as DINOv3's does with 168 px, of which it sees "
        "10 x 10 patches of 16.",
    )
    local_scale: Pair = Field(default=(0.05, 0.4), description="Area of a local crop. Source: [C].")
    num_local: CountOrZero = Field(default=8, description="Local crops per image. Source: [C].")
    mixture: Annotated[tuple[CropSizes, ...], Field(strict=False)] = Field(
        default=(),
        description="Sizes of which each step draws one, the same on all ranks and in all "
        "micro-batches, as in DINOv3's high-resolution phase: [{weight: 0.3, global_size: 512, "
        "local_size: 112, gram_crop_size: 768}, ...]. Weights are shares of the steps and sum to "
        "1; gram_crop_size is that of gram.crop_size, for runs with a Gram loss. Empty: all steps "
        "have the sizes above.",
    )

    @model_validator(mode="before")
    @classmethod
    def _largest_of_mixture(cls, values: object) -> object:
        given = values.get("mixture") if isinstance(values, Mapping) else None
        if not isinstance(values, Mapping) or not isinstance(given, list | tuple):
            return values
        largest = {}
        for key in _LARGEST:
            sizes = [entry.get(key) for entry in given if isinstance(entry, Mapping)]
            whole = [size for size in sizes if type(size) is int]  # others are refused below
            if whole:
                largest[key] = max(whole)
        return {**largest, **values}

    @model_validator(mode="after")
    def _mixture_is_one(self) -> "CropsConfig":
        if not self.mixture:
            return self
        total = sum(sizes.weight for sizes in self.mixture)
        if abs(total - 1) > _ROUNDING:
            raise ValueError(f"mixture: the weights sum to {total:.9g}, need 1")
        for key in _LARGEST:
            value, largest = getattr(self, key), max(getattr(s, key) for s in self.mixture)
            if value != largest:
                raise ValueError(
                    f"{key}: {value} px is not the largest of crops.mixture, {largest} px; leave "
                    "it out, or set crops.mixture=[] for one size"
                )
        return self

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


def not_whole_patches(sizes: Mapping[str, int], patch: int) -> list[str]:
    """Sizes by key that are not multiples of the patch size."""
    return [
        f"{key}: {size} px is not a multiple of the patch size {patch} px; "
        f"nearest: {_nearest_multiples(size, patch)}"
        for key, size in sizes.items()
        if size % patch
    ]


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return " or ".join(str(size) for size in (below, below + unit) if size)
