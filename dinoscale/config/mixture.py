"""The training images as a configuration names them: one source, or a weighted mixture."""

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from dinoscale.config.fields import PathText, Positive, Section


class WeightedSource(Section):
    """One source of a mixture."""

    source: PathText = Field(description="A folder, shards, or 'synthetic:...'.")
    weight: Positive = Field(
        default=1.0, description="Its share of the images drawn, relative to the other sources."
    )


ONE_SOURCE, MIXTURE = "<one source>", "<mixture>"  # in pydantic's errors: which of the two was read
TrainingImages = Annotated[
    Annotated[PathText, Tag(ONE_SOURCE)]
    | Annotated[tuple[WeightedSource, ...], Field(strict=False), Tag(MIXTURE)],
    Discriminator(lambda value: MIXTURE if isinstance(value, (list, tuple)) else ONE_SOURCE),
]
