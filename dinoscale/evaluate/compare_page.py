"""The page of a comparison: one HTML file that fetches nothing and runs nothing.

It is built as a tree of elements, so that no text (names of files, messages) can become markup, and
its own policy forbids a browser anything but the pictures inside.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from PIL import Image, UnidentifiedImageError

from dinoscale.evaluate.compare import NOT_RANKED, Cell, Column, Comparison, Report, Row
from dinoscale.evaluate.compare_plots import draw_column, printable
from dinoscale.evaluate.compare_runs import write

PAGE, DATA = "compare.html", "compare.json"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PICTURE_WIDTH, PICTURE_HEIGHT = 1000, 1400  # pixels, at most
VIDEOS_SHOWN = 4
DIFFERENCES_SHOWN = 5

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 75em;
  padding: 0 1.5em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin: 2.2em 0 .4em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8em 0; }
th, td { padding: .35em .9em; text-align: right; border-bottom: 1px solid #ddd;
  vertical-align: top; }
th { font-weight: 600; } thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.untrained, tr.floor, tr.untrained th, tr.floor th { color: #666; font-weight: normal; }
tr.weights + tr.untrained > *, tr.weights + tr.floor > * { border-top: 2px solid #888; }
td { font-variant-numeric: tabular-nums; }
td.best { font-weight: 700; background: #eaf5ea; }
td.error { color: #a11; text-align: left; max-width: 22em; font-size: .85em; }
small { display: block; font-weight: normal; color: #666; font-size: .82em; max-width: 22em;
  overflow-wrap: anywhere; }
small.warning { color: #a11; }
th small { text-align: inherit; }
figure { display: inline-block; margin: .6em 1.4em .6em 0; vertical-align: top; max-width: 100%; }
figcaption { color: #555; font-size: .9em; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1em 1.2em; font-size: .88em; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: #245; }
"""


def write_page(comparison: Comparison, folder: Path) -> None:
    """Write the page and the table as JSON into a folder, which is made where it is not there.

    Raises:
        ConfigError: they cannot be written.
    """
    write(folder / DATA, json.dumps(comparison.as_json(), indent=1) + "\n")
    write(folder / PAGE, "<!DOCTYPE html>\n" + _markup(_page(comparison)) + "\n")


def _markup(element: Element) -> str:
    return ElementTree.tostring(element, encoding="unicode", method="html")


def _element(tag: str, *content: str | Element, **attributes: str) -> Element:
    """An element; `class_` for the attribute."""
    element = Element(
        tag, {name.rstrip("_"): printable(value) for name, value in attributes.items()}
    )
    for part in content:
        if isinstance(part, Element):
            element.append(part)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + printable(part)
        else:
            element.text = (element.text or "") + printable(part)
    return element


def _page(comparison: Comparison) -> Element:
    policy = _element("meta", content=POLICY)
    policy.set("http-equiv", "Content-Security-Policy")
    head = _element(
        "head",
        _element("meta", charset="utf-8"),
        policy,
        _element("meta", name="viewport", content="width=device-width"),
        _element("title", "dinoscale: comparison"),
        _element("style", _STYLE),
    )
    numbers = range(len(comparison.columns))
    body = _element(
        "body",
        _element("h1", "Comparison"),
        _element("p", _summary(comparison)),
        _element("div", _table(comparison), class_="scroll"),
        _element("h2", "Weights"),
        _list((row.label, row.about) for row in comparison.rows if row.kind != "floor"),
        *(_section(comparison, number) for number in numbers),
    )
    return _element("html", head, body, lang="en")


def _summary(comparison: Comparison) -> str:
    said = (
        "Percent, more is better; the best of a column is bold. Only equal protocols and data share"
        " a column, and what is written above a column is what sets it apart from others of its"
        " task."
    )
    if any(column.task in NOT_RANKED for column in comparison.columns):
        said += f" No column of {' or '.join(sorted(NOT_RANKED))} has a best."
    if comparison.failed:
        said += f" {comparison.failed} failed: the table says why."
    return said


def _table(comparison: Comparison) -> Element:
    numbers = range(len(comparison.columns))
    heads = [_head(column) for column in comparison.columns]
    best = [comparison.best(number) for number in numbers]
    rows = [
        _element(
            "tr",
            _element("th", row.label, scope="row", title=row.about),
            *(_cell(row, number, best[number]) for number in numbers),
            class_=row.kind,
        )
        for row in comparison.rows
    ]
    return _element(
        "table",
        _element("thead", _element("tr", _element("th"), *heads)),
        _element("tbody", *rows),
    )


def _head(column: Column) -> Element:
    shown = [f"{name}: {_value(value)}" for name, value in column.differs.items()]
    more = len(shown) - DIFFERENCES_SHOWN
    if more > 0:
        shown = [*shown[:DIFFERENCES_SHOWN], f"and {more} more, see below"]
    notes = [
        _element("small", text) for text in ([column.headline] if column.headline else []) + shown
    ]
    return _element("th", column.task, *notes, scope="col")


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 90 else f"{text[:80]} ..."


def _cell(row: Row, number: int, best: float | None) -> Element:
    cell = row.cells.get(number, Cell())
    if cell.error:
        return _element("td", f"failed: {cell.error}", class_="error")
    if not cell.scores:
        return _element("td", "drawn" if cell.report else "")
    low, high = (f"{end(cell.headlines):.1f}" for end in (min, max))
    text = low if low == high else f"{low} to {high}"
    notes = []
    if row.kind == "weights" and cell.not_above_floor:
        notes.append(_element("small", "not above its floors", class_="warning"))
    is_best = row.kind == "weights" and best is not None and cell.headlines[0] == best
    return _element("td", text, *notes, **({"class_": "best"} if is_best else {}))


def _list(pairs: Iterable[tuple[str, str]]) -> Element:
    parts = [
        _element(tag, text) for pair in pairs for tag, text in zip(("dt", "dd"), pair, strict=True)
    ]
    return _element("dl", *parts)


def _section(comparison: Comparison, number: int) -> Element:
    """All that is known about a column."""
    column = comparison.columns[number]
    cells = {row.label: row.cells[number] for row in comparison.rows if number in row.cells}
    same = [i for i, other in enumerate(comparison.columns) if other.task == column.task]
    place = f" ({same.index(number) + 1} of {len(same)})" if len(same) > 1 else ""
    plots = [
        _figure(_data("svg+xml", plot.svg), plot.caption, "")
        for plot in draw_column(comparison, number)
    ]
    settings = _list((name, _value(value)) for name, value in column.settings.items())
    pictures = [
        picture for label, cell in cells.items() for picture in _pictures(cell.report or {}, label)
    ]
    return _element(
        "section",
        _element("h2", column.task + place),
        *plots,
        *([_numbers(cells)] if any(cell.scores for cell in cells.values()) else []),
        _element("details", _element("summary", "protocol and data"), settings),
        *pictures,
    )


def _numbers(cells: Mapping[str, Cell]) -> Element:
    """Every number of every score."""
    names = list(dict.fromkeys(n for cell in cells.values() for s in cell.scores for n in s))
    rows = [
        _element(
            "tr",
            _element("th", label, scope="row"),
            *(_element("td", f"{score[name]:.2f}" if name in score else "") for name in names),
        )
        for label, cell in cells.items()
        for score in cell.scores
    ]
    heads = [_element("th", name, scope="col") for name in names]
    table = _element(
        "table",
        _element("thead", _element("tr", _element("th"), *heads)),
        _element("tbody", *rows),
    )
    return _element("div", table, class_="scroll")


def _pictures(report: Report, label: str) -> list[Element]:
    """What the task has drawn: its sheet, or the middle frames of some videos."""
    files = [report["picture"]] if isinstance(report.get("picture"), str) else []
    if report.get("task") == "video" and isinstance(report.get("out"), str):
        files = [str(path) for path in sorted(Path(report["out"]).glob("*.gif"))[:VIDEOS_SHOWN]]
    figures = []
    for file in files:
        picture = _small(Path(file))
        if picture is not None:
            name = f", {Path(file).stem}" if report["task"] == "video" else ""
            figures.append(_figure(_data("png", picture), f"{label}{name}", label + name))
    return figures


def _small(path: Path) -> bytes | None:
    """A picture as PNG, of an animation the middle frame; nothing where it is gone."""
    try:
        with Image.open(path, formats=("PNG", "GIF")) as image:
            image.seek(getattr(image, "n_frames", 1) // 2)
            small = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    small.thumbnail((PICTURE_WIDTH, PICTURE_HEIGHT), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _figure(source: str, alt: str, caption: str) -> Element:
    caption_below = [_element("figcaption", caption)] if caption else []
    return _element("figure", _element("img", src=source, alt=alt), *caption_below)
