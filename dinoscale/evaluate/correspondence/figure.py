"""The figure of matched places: two pictures side by side, and lines from place to place.

Shape letter: K places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

HEIGHT = 300  # pixels of a row
GAP = 8  # pixels between pictures, and between rows
LEGEND = 24  # pixels above them, where words have the colors of the lines
SHOWN = 24  # places of a pair, evenly chosen
RADIUS = 4  # pixels, of a place
RIGHT, WRONG, TRUE = "#35d05a", "#ff4040", "#3df2ff"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Match:
    """Two pictures and places in them, as fractions of width and height, (K, 2).

    Attributes:
        source: a picture in RGB.
        target: likewise.
        places: in the source.
        found: in the target.
        true: where they should be found.
        right: (K,) bool.
        label: written into the source.
    """

    source: Image.Image
    target: Image.Image
    places: Array
    found: Array
    true: Array
    right: NDArray[np.bool_]
    label: str


def draw_matches(matches: Sequence[Match]) -> Image.Image:
    """A row for each match: right ones green, wrong ones red with a line to the true place."""
    rows = [_draw(match) for match in matches]
    height = LEGEND + len(rows) * (HEIGHT + GAP) - GAP
    words = _legend()
    sheet = Image.new("RGB", (max(words.width, *(row.width for row in rows)), height), "black")
    sheet.paste(words, (0, 0))
    for number, row in enumerate(rows):
        sheet.paste(row, (0, LEGEND + number * (HEIGHT + GAP)))
    return sheet


def _legend() -> Image.Image:
    strip, font, left = Image.new("RGB", (300, LEGEND)), ImageFont.load_default(0.6 * LEGEND), GAP
    pen = ImageDraw.Draw(strip)
    for word, color in {"right": RIGHT, "wrong": WRONG, "where it should be": TRUE}.items():
        pen.text((left, LEGEND / 2), word, fill=color, font=font, anchor="lm")
        left += round(font.getlength(word)) + 2 * GAP
    return strip.crop((0, 0, left, LEGEND))


def _draw(match: Match) -> Image.Image:
    source, target = (_resized(picture) for picture in (match.source, match.target))
    row = Image.new("RGB", (source.width + GAP + target.width, HEIGHT), "black")
    left = source.width + GAP
    row.paste(source, (0, 0))
    row.paste(target, (left, 0))
    pen = ImageDraw.Draw(row)
    chosen = np.unique(np.linspace(0, len(match.places) - 1, SHOWN).round().astype(int))
    for number in chosen.tolist():
        start = _at(match.places[number], source, 0)
        end, true = (_at(each[number], target, left) for each in (match.found, match.true))
        color = RIGHT if match.right[number] else WRONG
        pen.line([start, end], fill=color, width=1)
        if not match.right[number]:
            pen.line([end, true], fill=TRUE, width=1)
            _dot(pen, true, TRUE)
        _dot(pen, start, color)
        _dot(pen, end, color)
    share = f"{match.label}: {match.right.mean():.0%} of {len(match.right)}"
    pen.rectangle((0, HEIGHT - 16, 8 + 6 * len(share), HEIGHT), fill="black")
    pen.text((4, HEIGHT - 14), share, fill="white")
    return row


def _resized(picture: Image.Image) -> Image.Image:
    return picture.resize((max(1, round(picture.width * HEIGHT / picture.height)), HEIGHT))


def _at(place: Array, picture: Image.Image, left: int) -> tuple[float, float]:
    return left + float(place[0]) * picture.width, float(place[1]) * picture.height


def _dot(pen: ImageDraw.ImageDraw, at: tuple[float, float], color: str) -> None:
    x, y = at
    pen.ellipse((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), outline=color, width=2)
