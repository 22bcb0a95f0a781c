"""What a recipe consists of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A value of the preset."""

    key: str  # section.key
    value: object
    why: str


@dataclass(frozen=True)
class Recipe:
    """A preset: what it inherits from, what it changes, and what to look at first."""

    base: str
    settings: tuple[Setting, ...]
    cautions: tuple[str, ...]
