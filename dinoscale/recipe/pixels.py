"""Settings of the pixels: channels, normalisation and white, of a set or of weights."""

from __future__ import annotations

from data_tools.set_facts import SetFacts
from dinoscale.convert.card import BackboneCard
from dinoscale.recipe.preset import Setting

LEAST_STD = 0.004  # a level of 255, in which pixels are counted
_COLORED = 0.01  # share of images with color, up to which a set is gray


def pixels_of_weights(card: BackboneCard, facts: SetFacts) -> list[Setting]:
    """Channels and normalisation of the weights, unless files cannot be read as such channels."""
    channels = card.backbone.in_chans
    if channels == 1 < channels_of(facts) and readable_as(3, facts):
        why = "the images have color, which the one channel of the weights would drop"
        return _pixels(facts, channels=3, why=why)
    if not readable_as(channels, facts):
        why = (
            f"as stored: such files cannot be read as the {channels} of the weights, whose first"
            " layer is adapted; each channel gets the mean of theirs"
        )
        return _pixels(facts, channels=channels_of(facts), why=why)
    return [
        Setting("data.channels", channels, "theirs"),
        Setting("data.mean", list(card.mean), "theirs: their first layer has learned with it"),
        Setting("data.std", list(card.std), "theirs"),
        *_color_ops(channels),
        *_white(facts),
    ]


def readable_as(channels: int, facts: SetFacts) -> bool:
    """Whether a decoder makes so many channels of most files."""
    if channels == facts.channels:
        return True
    return {channels, facts.channels} <= {1, 3} and not facts.arrays


def pixels_of_set(facts: SetFacts) -> list[Setting]:
    """Channels, normalisation and white of the set itself."""
    return _pixels(facts, channels=channels_of(facts), why=_why_channels(facts))


def _pixels(facts: SetFacts, *, channels: int, why: str) -> list[Setting]:
    mean, std = list(facts.mean), list(facts.std)
    if channels == 1:
        mean, std = mean[:1], std[:1]
    return [
        Setting("data.channels", channels, why),
        Setting("data.mean", mean, f"of {facts.sample - facts.unreadable} of the images"),
        Setting(
            "data.std",
            [max(value, LEAST_STD) for value in std],
            "likewise" if min(std) >= LEAST_STD else "likewise, but at least a level of 255",
        ),
        *_color_ops(channels),
        *_white(facts),
    ]


def _color_ops(channels: int) -> list[Setting]:
    if channels in (1, 3):
        return []
    return [Setting("data.color_ops_on", "device", "colors of other channels change there only")]


def channels_of(facts: SetFacts) -> int:
    """Channels for the set: one where nearly all is gray."""
    if facts.channels not in (1, 3) or facts.arrays:
        return facts.channels
    return 1 if 1 - facts.colorless <= _COLORED else 3


def _why_channels(facts: SetFacts) -> str:
    if channels_of(facts) == 1 and facts.channels == 3:
        return "the images of the sample are gray, though stored with three channels"
    if channels_of(facts) == 3 and facts.channels == 1:
        return "most files are gray; RGB holds the colored ones, too"
    return "as stored in most files"


def _white(facts: SetFacts) -> list[Setting]:
    if facts.max_pixel_value is None:
        return []
    why = "white, by the highest pixel: check it"
    return [Setting("data.max_pixel_value", facts.max_pixel_value, why)]
