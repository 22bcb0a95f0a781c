"""Parts of configuration sections: types of values, and the strict base class."""

import os
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
)

from dinoscale.config.secrets import require_no_secrets

_Value = TypeVar("_Value")

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
NUMBER, AUTO = "<number>", "<auto>"  # tags in pydantic's errors: which of the two was read
NAMED, SIZE = "<named size>", "<size>"  # the same of a model in a sweep
LADDER, LIST = "<ladder>", "<list>"  # and of a list of them
ONE_SOURCE, MIXTURE = "<one source>", "<mixture>"  # and of the training images
CountOrAuto = Annotated[
    Annotated[Count, Tag(NUMBER)] | Annotated[Literal["auto"], Tag(AUTO)],
    Discriminator(lambda value: AUTO if value == "auto" else NUMBER),
]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(gt=0, le=1)]
# Of a file, a folder or a source of images; a leading ~ is the home directory, as in a shell.
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
# strict=False lets a YAML list become a tuple; its items stay strict.
Pair = Annotated[tuple[float, float], Field(strict=False)]
_Beta = Annotated[float, Field(ge=0, lt=1)]
BetaPair = Annotated[tuple[_Beta, _Beta], Field(strict=False)]
ThreeFractions = Annotated[tuple[Fraction, Fraction, Fraction], Field(strict=False)]
Counts = Annotated[tuple[Count, ...], Field(strict=False)]
Fractions = Annotated[tuple[Fraction, ...], Field(strict=False)]
Positives = Annotated[tuple[Positive, ...], Field(strict=False)]
_STREAMED = ("http", "https", "s3", "gs", "hdfs", "pipe")  # schemes


def is_streamed(spec: str) -> bool:
    """Whether images are read over the network or from a command, not from a disk."""
    scheme, colon, _ = spec.partition(":")
    return bool(colon) and scheme.lower() in _STREAMED


class Section(BaseModel):
    """Base of all sections: frozen; refuses unknown keys, '2' for 2, infinity and passwords."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )

    @field_validator("*")
    @classmethod
    def _no_secrets(cls, value: _Value) -> _Value:
        require_no_secrets(value)
        return value


class WeightedSource(Section):
    """One source of a mixture."""

    source: PathText = Field(description="A folder, shards, or 'synthetic:...'.")
    weight: Positive = Field(
        default=1.0, description="Its share of the images drawn, relative to the other sources."
    )


TrainingImages = Annotated[
    Annotated[PathText, Tag(ONE_SOURCE)]
    | Annotated[tuple[WeightedSource, ...], Field(strict=False), Tag(MIXTURE)],
    Discriminator(lambda value: MIXTURE if isinstance(value, (list, tuple)) else ONE_SOURCE),
]
