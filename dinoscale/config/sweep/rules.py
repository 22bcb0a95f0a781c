"""Scaling rules of a sweep: powers of a quantity relative to the base configuration.

With a quantity q of a run and q0 of the base, an exponent e multiplies by (q / q0)^e.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from dinoscale.config.sections.fields import Count, Section

Exponent = Annotated[float, Field(ge=-4, le=4)]  # a larger one is a slip


class Powers(Section):
    """Exponents by quantity; 0: no dependence on it."""

    batch_size: Exponent = Field(default=0.0, description="Exponent of the batch size.")
    width: Exponent = Field(default=0.0, description="Exponent of the width of a token.")
    depth: Exponent = Field(default=0.0, description="Exponent of the number of blocks.")
    images: Exponent = Field(default=0.0, description="Exponent of the images seen in training.")
    parameters: Exponent = Field(default=0.0, description="Exponent of the backbone's parameters.")


class LrRule(Powers):
    """Exponents of the peak learning rate, which follows optim.lr_scaling without a rule.

    optim.min_lr, the learning rate at the end, stays as it is.
    """

    batch_size: Exponent = Field(
        default=1.0,
        description="1: linear (Goyal et al. 2017, arXiv:1706.02677), as in DINO. 0.5: with the "
        "square root, for Adam (Malladi et al. 2022, arXiv:2205.10287), as in DINOv2. 0: the same "
        "for every batch. Left out: as optim.lr_scaling of the base says.",
    )


class MomentumRule(Section):
    """m becomes m^((batch size / base's)^e), at the start and at the end."""

    batch_size: Exponent = Field(
        default=0.0,
        description="1: the teacher averages over as many images as in the base, whatever the "
        "batch (Busbridge et al. 2023, arXiv:2307.13813). 0: over as many steps.",
    )


class WarmupRule(Section):
    """Length of the warm-up, rounded to whole epochs; without a rule optim.warmup_epochs."""

    fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Fraction of the run."
    )
    images: Count | None = Field(default=None, description="Images seen during the warm-up.")

    @model_validator(mode="after")
    def _one_of_two(self) -> "WarmupRule":
        if self.model_fields_set and (self.fraction is None) == (self.images is None):
            raise ValueError("needs either fraction or images")
        return self


# Name of a rule -> settings that it gives.
KEYS_OF_RULES = {
    "lr": ("optim.lr",),
    "momentum": ("dino.momentum", "dino.momentum_end"),
    "weight_decay": ("optim.weight_decay", "optim.weight_decay_end"),
    "warmup": ("optim.warmup_epochs",),
}


class RulesConfig(Section):
    """Rules by what they set; a setting without a rule stays as in the base."""

    lr: LrRule = Field(default_factory=LrRule)
    momentum: MomentumRule = Field(default_factory=MomentumRule)
    weight_decay: Powers = Field(default_factory=Powers)
    warmup: WarmupRule = Field(default_factory=WarmupRule)

    @property
    def given(self) -> set[str]:
        """Names of the rules that the file states."""
        return self.model_fields_set


def rules_of(values: Mapping[str, object]) -> RulesConfig | None:
    """Rules as a table stores them; None for those of another version."""
    try:
        return RulesConfig.model_validate(values)
    except ValidationError:
        return None
