"""A contact sheet: many small pictures on one, with captions."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.sources.source import Source

_SIDE = 128  # pixels of a picture at most
_GAP = 6
_LINE = 13  # height of a line of text
_LETTERS = 21  # of the built-in font in _SIDE pixels
_PAPER, _INK, _RED = (245, 245, 245), (40, 40, 40), (200, 0, 0)


def draw_sheet(source: Source, ids: NDArray[np.int64]) -> bytes:
    """Draw pictures in rows, with number, size and class below; the bytes of a PNG.

    Args:
        source: source of the pictures.
        ids: numbers of the pictures, (n,).
    """
    columns = math.ceil(math.sqrt(len(ids)))
    rows = math.ceil(len(ids) / columns)
    cell = (_SIDE + _GAP, _SIDE + 2 * _LINE + _GAP)
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    labels, names = source.labels, source.class_names
    for place, index in enumerate(ids.tolist()):
        left, top = _GAP + place % columns * cell[0], _GAP + place // columns * cell[1]
        color, size = _INK, ""
        try:
            picture = source.picture(index)
            thumbnail = Image.fromarray(picture.pixels())
            size = f" {picture.width}x{picture.height}"
            thumbnail.thumbnail((_SIDE, _SIDE))
            shift = ((_SIDE - thumbnail.width) // 2, (_SIDE - thumbnail.height) // 2)
            sheet.paste(thumbnail, (left + shift[0], top + shift[1]))
        except BadSampleError:
            color, size = _RED, " unreadable"
        kind = ""
        if labels is not None and labels[index] >= 0:
            kind = str(labels[index]) if names is None else names[labels[index]]
        for line, text in enumerate((f"#{index}{size}", kind)):
            shown = text.encode("ascii", "replace").decode()[:_LETTERS]
            draw.text((left, top + _SIDE + line * _LINE), shown, fill=color)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
