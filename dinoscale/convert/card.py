"""The card of a weights file: which backbone its tensors belong to, and how to feed it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dinoscale.config.renamed import CARD, with_new_keys
from dinoscale.errors import CheckpointError
from dinoscale.models.rope import Rope
from dinoscale.runtime.outputs import METADATA_KEY

__all__ = ["METADATA_KEY", "BackboneCard", "BackboneShape", "Preprocessing", "parse_card"]

FORMAT = 7  # of the card; a file with a higher one was written by a newer dinoscale
_WITHOUT_LICENCE = 6  # the formats before, still read: a card had no licence
_WITHOUT_DINOV3 = 5  # a backbone had no layers of DINOv3
_WITHOUT_DINOV2 = 4  # nor of DINOv2
_WITH_WHITE = 3  # max_pixel_value was called white
_WITHOUT_NORM_EPS = 2
_READ = range(_WITHOUT_NORM_EPS, FORMAT + 1)


@dataclass(frozen=True)
class BackboneShape:
    """Arguments of `models.zoo.build_backbone`; None where the architecture has no such size."""

    name: str
    img_size: int  # pixels along one side, of the stored positional embedding
    patch_size: int | None = None  # pixels
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    in_chans: int = 3  # channels of an image
    norm_eps: float | None = None  # of a ViT's layer norms, if not the default of its name
    layer_scale: float | None = None  # initial factor of a branch; None as the name has it
    ffn: Literal["mlp", "swiglu"] | None = None
    registers: int | None = None  # register tokens, added to the name's model
    position_resize: Literal["by_factor", "by_size"] | None = None
    mask_token: bool = False  # whether there is an embedding for masked patches
    ffn_ratio: float | None = None  # width of an MLP over that of a token
    ffn_multiple: int | None = None  # of which the width of a SwiGLU is one
    rope: Rope | None = None  # rotary positions in place of learned ones
    qkv_bias: bool | None = None
    mask_key_bias: bool | None = None
    local_norm: bool = False  # whether there is a norm of local crops, for training only


# Entries of a backbone that older cards lack.
_DINOV3_LAYERS: dict[str, object] = {
    key: getattr(BackboneShape, key)
    for key in (*("ffn_ratio", "ffn_multiple", "rope", "qkv_bias", "mask_key_bias", "local_norm"),)
}
_DINOV2_LAYERS: dict[str, object] = {
    key: getattr(BackboneShape, key)
    for key in ("layer_scale", "ffn", "registers", "position_resize", "mask_token")
} | _DINOV3_LAYERS


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of an image: resize, center crop, then (x / 255 - mean) / std."""

    mean: tuple[float, ...]  # of each channel in 0..1
    std: tuple[float, ...]
    resize: int  # short side, pixels
    crop: int  # pixels

    def __str__(self) -> str:
        """The settings, for a sentence."""
        mean, std = [*self.mean], [*self.std]
        return f"resize {self.resize}, crop {self.crop}, mean {mean}, std {std}"


@dataclass(frozen=True)
class BackboneCard:
    """A backbone and its preprocessing: resize, center crop, then (x / 255 - mean) / std."""

    backbone: BackboneShape
    mean: tuple[float, ...]  # of each channel in 0..1
    std: tuple[float, ...]
    resize: int  # short side, pixels
    crop: int  # pixels
    source: str  # where the weights come from, for readers
    max_pixel_value: float | None = None  # means 1 in files of more than 8 bit; None guesses
    licence: str | None = None  # what is known of it; None of what began with random weights

    def to_json(self) -> str:
        """Write the card; equal cards give equal text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @property
    def preprocessing(self) -> Preprocessing:
        """The part that other libraries can store."""
        return Preprocessing(self.mean, self.std, self.resize, self.crop)


def card_text_of(conversion: Mapping[str, object]) -> str | None:
    """Text for `parse_card` out of the card of `dinoscale convert`; None if it has no backbone."""
    if "backbone" not in conversion:
        return None
    said = with_new_keys(conversion, CARD)
    known: dict[str, object] = {"licence": None}
    known |= {key: said[key] for key in BackboneCard.__dataclass_fields__ if key in said}
    if isinstance(known["backbone"], dict):  # of an earlier version
        known["backbone"] = {**_DINOV2_LAYERS, **known["backbone"]}
    return json.dumps({"format": FORMAT, **known})


def parse_card(text: str) -> BackboneCard:
    """Read a card strictly.

    Raises:
        CheckpointError: not a card, another format, or a key missing, unknown or of another type.
    """
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its card is not JSON ({error})") from error
    found = card.get("format") if isinstance(card, dict) else card
    if not isinstance(card, dict) or not isinstance(found, int) or found not in _READ:
        raise CheckpointError(f"its card has format {found!r}, this dinoscale reads {FORMAT}")
    if found <= _WITH_WHITE:
        card = with_new_keys(card, CARD)
    if found <= _WITHOUT_LICENCE:
        card = {"licence": None, **card}
    _check_keys(card, {"format", *BackboneCard.__dataclass_fields__}, "card")
    shape = card["backbone"]
    if not isinstance(shape, dict):
        raise CheckpointError(f"its card's backbone is {shape!r}, not a mapping")
    if found == _WITHOUT_NORM_EPS:
        shape = {"norm_eps": None, **shape}
    if found <= _WITHOUT_DINOV3:
        lacking = _DINOV3_LAYERS if found == _WITHOUT_DINOV3 else _DINOV2_LAYERS
        shape = {**lacking, **shape}
    _check_keys(shape, set(BackboneShape.__dataclass_fields__), "card's backbone")
    in_chans = _size(shape, "in_chans")
    return BackboneCard(
        backbone=BackboneShape(
            name=_text(shape, "name"),
            img_size=_size(shape, "img_size"),
            patch_size=_optional_size(shape, "patch_size"),
            embed_dim=_optional_size(shape, "embed_dim"),
            depth=_optional_size(shape, "depth"),
            num_heads=_optional_size(shape, "num_heads"),
            in_chans=in_chans,
            norm_eps=_optional_positive(shape, "norm_eps"),
            layer_scale=_optional_positive(shape, "layer_scale"),
            ffn=_optional_choice(shape, "ffn", ("mlp", "swiglu")),
            registers=_optional_count(shape, "registers"),
            position_resize=_optional_choice(shape, "position_resize", ("by_factor", "by_size")),
            mask_token=_truth(shape, "mask_token"),
            ffn_ratio=_optional_positive(shape, "ffn_ratio"),
            ffn_multiple=_optional_size(shape, "ffn_multiple"),
            rope=_rope(shape["rope"]),
            qkv_bias=_optional_truth(shape, "qkv_bias"),
            mask_key_bias=_optional_truth(shape, "mask_key_bias"),
            local_norm=_truth(shape, "local_norm"),
        ),
        mean=_numbers(card, "mean", count=in_chans),
        std=_numbers(card, "std", count=in_chans),
        resize=_size(card, "resize"),
        crop=_size(card, "crop"),
        source=_text(card, "source"),
        max_pixel_value=_optional_positive(card, "max_pixel_value"),
        licence=None if card["licence"] is None else _text(card, "licence"),
    )


def _rope(found: object) -> Rope | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"its card's rope is {found!r}, not a mapping")
    _check_keys(found, set(Rope.__dataclass_fields__), "card's rope")
    rope = Rope(
        base=_optional_positive(found, "base"),
        min_period=_optional_positive(found, "min_period"),
        max_period=_optional_positive(found, "max_period"),
        coordinates=_optional_choice(found, "coordinates", ("separate", "min", "max")),
    )
    if rope.base is None and None in (rope.min_period, rope.max_period):
        raise CheckpointError("its card's rope has neither a base nor both periods")
    return rope


def _check_keys(found: Mapping[str, object], expected: set[str], what: str) -> None:
    missing, unknown = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if missing or unknown:
        raise CheckpointError(f"its {what} lacks {missing} and has unknown {unknown}")


def _text(card: Mapping[str, object], key: str) -> str:
    value = card[key]
    if not isinstance(value, str):
        raise CheckpointError(f"its card's {key} is {value!r}, not a text")
    return value


def _size(card: Mapping[str, object], key: str) -> int:
    value = card[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"its card's {key} is {value!r}, not a whole number above 0")
    return value


def _optional_size(card: Mapping[str, object], key: str) -> int | None:
    return None if card[key] is None else _size(card, key)


def _optional_count(card: Mapping[str, object], key: str) -> int | None:
    value = card[key]
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"its card's {key} is {value!r}, not a whole number")
    return value


def _optional_choice(card: Mapping[str, object], key: str, choices: tuple[str, ...]) -> Any:
    value = card[key]
    if value is not None and value not in choices:
        raise CheckpointError(f"its card's {key} is {value!r}, not one of {', '.join(choices)}")
    return value


def _truth(card: Mapping[str, object], key: str) -> bool:
    value = card[key]
    if not isinstance(value, bool):
        raise CheckpointError(f"its card's {key} is {value!r}, not true or false")
    return value


def _optional_truth(card: Mapping[str, object], key: str) -> bool | None:
    return None if card[key] is None else _truth(card, key)


def _numbers(card: Mapping[str, object], key: str, *, count: int) -> tuple[float, ...]:
    value = card[key]
    if not isinstance(value, list) or not all(type(x) in (int, float) for x in value):
        raise CheckpointError(f"its card's {key} is {value!r}, not a list of numbers")
    if len(value) != count:
        raise CheckpointError(f"its card's {key} is {value!r}, not {count} numbers (in_chans)")
    return tuple(float(x) for x in value)


def _optional_positive(card: Mapping[str, object], key: str) -> float | None:
    value = card[key]
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"its card's {key} is {value!r}, not a number above 0")
    return float(value)
