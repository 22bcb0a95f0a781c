"""The axes of a sweep: what it varies, each with a list of distinct values."""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from dinoscale.config.sections.fields import LADDER, LIST, NAMED, SIZE, Count, Section

# Far above all that was ever trained, to catch slips.
MOST_IMAGES = 10**15  # seen in a run
MOST_FLOPS = 1e35  # of a training
MOST_LR = 1e6  # and of a factor on it
MAX_STEPS = 100  # of a ladder
MAX_WIDTH, MAX_DEPTH = 2**14, 1000


class ModelSize(Section):
    """A ViT of custom size, with attention heads of width `head_dim`."""

    embed_dim: Count = Field(le=MAX_WIDTH, description="Width of a token, a multiple of head_dim.")
    depth: Count = Field(le=MAX_DEPTH, description="Number of transformer blocks.")
    head_dim: Count = Field(
        default=64,
        description="Width of an attention head. Source: the ViTs of Dosovitskiy et al. 2021 "
        "(arXiv:2010.11929), table 1.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_ladder(cls, values: object) -> object:
        if isinstance(values, Mapping) and "ladder" in values:
            raise ValueError("a ladder is no item of a list; write model: {ladder: ...}")
        return values

    @model_validator(mode="after")
    def _whole_heads(self) -> "ModelSize":
        if self.embed_dim % self.head_dim:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not whole heads of {self.head_dim}; "
                "change it, or set head_dim beside it"
            )
        return self


_Size = Annotated[
    Annotated[Literal["tiny", "small", "base", "large"], Tag(NAMED)]
    | Annotated[ModelSize, Tag(SIZE)],
    Discriminator(lambda value: SIZE if isinstance(value, (Mapping, ModelSize)) else NAMED),
]


class _Ladder(Section):
    """Sizes between two, by equal factors of parameters; width and depth grow, head_dim stays."""

    first: _Size = Field(alias="from", description="The smallest.")
    last: _Size = Field(alias="to", description="The largest.")
    steps: Annotated[int, Field(ge=2, le=MAX_STEPS)] = Field(
        description="Number of sizes, both ends included."
    )
    head_dim: Count = Field(
        default=64, description="Width of an attention head; it divides every width."
    )


class LadderConfig(Section):
    """An axis of models between two sizes."""

    ladder: _Ladder = Field(description="The sizes at its ends, and how many.")


def _whole(value: object) -> object:
    """1e6 is a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number_or_share(value: object) -> object:
    number = isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= MOST_IMAGES
    share = isinstance(value, float) and 0 < value <= 1
    if not (number or share):
        raise ValueError(
            "needs a whole number of at least 2, or a fraction of the set above 0 and at most 1.0, "
            f"got {value!r}"
        )
    return value


_LENGTH = ("data.images_per_epoch", "train.steps_per_epoch", "train.stop_after_steps")
# What an axis is called in the file -> settings of a run that follow from it alone.
KEYS_OF_AXES = {
    "model": ("model.embed_dim", "model.depth", "model.num_heads"),
    "flops": _LENGTH,
    "images": _LENGTH,
    "subset_size": ("data.subset_size",),
    "batch_size": ("train.batch_size",),
    "lr": ("optim.lr",),
    "lr_factor": (),  # changes what others give
    "seed": ("seed",),
}


class AxesConfig(Section):
    """Axes by name; besides these, any setting of a run such as head.num_prototypes."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[tuple[object, ...], Field(strict=False)]]

    model: (
        Annotated[
            Annotated[LadderConfig, Tag(LADDER)]
            | Annotated[tuple[_Size, ...], Tag(LIST), Field(strict=False)],
            Discriminator(
                lambda value: LADDER if isinstance(value, (Mapping, LadderConfig)) else LIST
            ),
        ]
        | None
    ) = Field(
        default=None,
        description="Sizes of the backbone: tiny, small, base, large, {embed_dim, depth}, or "
        "{ladder: {from, to, steps}} for sizes between two. Source of the names: Dosovitskiy et "
        "al. 2021, Touvron et al. 2021 (arXiv:2012.12877).",
    )
    flops: tuple[Annotated[float, Field(gt=0, le=MOST_FLOPS)], ...] | None = Field(
        default=None,
        strict=False,
        description="FLOPs of a training, which give the images seen. Hoffmann et al. 2022 "
        "(arXiv:2203.15556), approach 2.",
    )
    images: (
        tuple[
            Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST_IMAGES)],
            ...,
        ]
        | None
    ) = Field(
        default=None,
        strict=False,
        description="Images seen in a training, repetitions counted.",
    )
    subset_size: tuple[Annotated[int | float, BeforeValidator(_number_or_share)], ...] | None = (
        Field(
            default=None,
            strict=False,
            description="data.subset_size: a number, or a fraction of the set (1.0: all).",
        )
    )
    batch_size: tuple[Count, ...] | None = Field(
        default=None, strict=False, description="Images of a step over all ranks."
    )
    lr: tuple[Annotated[float, Field(gt=0, le=MOST_LR)], ...] | None = Field(
        default=None,
        strict=False,
        description="optim.lr: peak learning rate per 256 images of a step.",
    )
    lr_factor: tuple[Annotated[float, Field(gt=0, le=MOST_LR)], ...] | None = Field(
        default=None,
        strict=False,
        description="Factor on the learning rate that base and rules give.",
    )
    seed: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] | None = Field(
        default=None, strict=False, description="Seed of a run."
    )

    @model_validator(mode="after")
    def _values_differ(self) -> "AxesConfig":
        for name, axis in self.by_name().items():
            if isinstance(axis, LadderConfig):
                continue
            if not axis:
                raise ValueError(f"{name}: is empty; give it values, or leave it out")
            seen = set()
            for value in axis:
                text = json.dumps(value, default=lambda size: size.model_dump())
                if text in seen:
                    raise ValueError(f"{name}: {text} is there twice")
                seen.add(text)
        return self

    def by_name(self) -> dict[str, "tuple[object, ...] | LadderConfig"]:
        """Values of the axes that are given: those above first, then settings as in the file."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            **{name: axis for name, axis in named.items() if axis is not None},
            **(self.__pydantic_extra__ or {}),
        }

    @property
    def num_points(self) -> int:
        """Combinations of values."""
        return math.prod(
            axis.ladder.steps if isinstance(axis, LadderConfig) else len(axis)
            for axis in self.by_name().values()
        )
