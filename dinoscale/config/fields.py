"""What the sections of a configuration are made of: kinds of numbers, and strictness."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(gt=0, le=1)]
# strict=False lets a YAML list become a tuple; its items stay strict.
Pair = Annotated[tuple[float, float], Field(strict=False)]
ThreeFractions = Annotated[tuple[Fraction, Fraction, Fraction], Field(strict=False)]
ThreePositive = Annotated[tuple[Positive, Positive, Positive], Field(strict=False)]


class Section(BaseModel):
    """What all sections share: no editing, no unknown keys, no '2' for 2, no infinity."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )
