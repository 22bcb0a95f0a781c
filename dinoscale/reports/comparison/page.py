"""The page of a comparison: a table of all scores, and a section for each of its columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from dinoscale.reports import html
from dinoscale.reports.comparison.paired_tests import PairedTest
from dinoscale.reports.comparison.plots import draw_column
from dinoscale.reports.comparison.scores import NOT_RANKED, Cell, Column, Comparison, Report, Row
from dinoscale.reports.html import element

PAGE, DATA = "compare.html", "compare.json"
VIDEOS_SHOWN = 4
DIFFERENCES_SHOWN = 5


def write_page(comparison: Comparison, folder: Path) -> None:
    """Write the page, and the table as JSON, into a folder; it is made if missing.

    Raises:
        ConfigError: they cannot be written.
    """
    html.write_file(folder / DATA, f"{json.dumps(comparison.as_json(), indent=1)}\n".encode())
    html.write_page("dinoscale: comparison", _body(comparison), folder / PAGE)


def _body(comparison: Comparison) -> list[Element]:
    numbers = range(len(comparison.columns))
    return [
        element("h1", "Comparison"),
        element("p", _summary(comparison)),
        _table(comparison),
        *_ranks(comparison),
        element("h2", "Weights"),
        html.definitions((row.label, row.about) for row in comparison.rows if row.kind != "floor"),
        *(_section(comparison, number) for number in numbers),
    ]


def _summary(comparison: Comparison) -> str:
    said = (
        "Percent, higher is better; the best of a column is bold. Only equal protocols and data"
        " share a column; the settings above it are those that differ from other columns of its"
        " task."
    )
    if any(column.task in NOT_RANKED for column in comparison.columns):
        said += f" Columns of {' and '.join(sorted(NOT_RANKED))} are not ranked."
    if comparison.failed:
        said += f" {comparison.failed} failed: the table shows the errors."
    return said


def _table(comparison: Comparison) -> Element:
    numbers = range(len(comparison.columns))
    heads = [_head(column) for column in comparison.columns]
    best = [comparison.best(number) for number in numbers]
    rows = [
        element(
            "tr",
            element("th", row.label, scope="row", title=row.about),
            *(_cell(row, number, best[number]) for number in numbers),
            class_=row.kind,
        )
        for row in comparison.rows
    ]
    return html.table([element("th"), *heads], rows)


def _head(column: Column) -> Element:
    shown = [f"{name}: {_value(value)}" for name, value in column.differs.items()]
    more = len(shown) - DIFFERENCES_SHOWN
    if more > 0:
        shown = [*shown[:DIFFERENCES_SHOWN], f"and {more} more, see below"]
    notes = [
        element("small", text) for text in ([column.headline] if column.headline else []) + shown
    ]
    return element("th", column.task, *notes, scope="col")


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 90 else f"{text[:80]} ..."


def _cell(row: Row, number: int, best: float | None) -> Element:
    cell = row.cells.get(number, Cell())
    if cell.error:
        return element("td", f"failed: {cell.error}", class_="error")
    if not cell.scores:
        return element("td", "drawn" if cell.report else "")
    low, high = (f"{end(cell.headlines):.1f}" for end in (min, max))
    text = low if low == high else f"{low} to {high}"
    notes = []
    if row.kind == "weights" and cell.not_above_baselines:
        notes.append(element("small", "not above its baselines", class_="warning"))
    is_best = row.kind == "weights" and best is not None and cell.headlines[0] == best
    return element("td", text, *notes, **({"class_": "best"} if is_best else {}))


def _ranks(comparison: Comparison) -> list[Element]:
    """A table of the rank of each weights in each column; nothing if no column ranks any."""
    numbers = [i for i in range(len(comparison.columns)) if comparison.ranks(i)]
    if not numbers:
        return []
    columns = [comparison.ranks(number) for number in numbers]
    means, of = comparison.mean_ranks()
    heads = [_head(comparison.columns[number]) for number in numbers]
    heads += [element("th", f"mean of {of}", scope="col")] if of > 1 else []
    rows = [
        element(
            "tr",
            element("th", row.label, scope="row"),
            *(element("td", _rank(ranks.get(row.label))) for ranks in columns),
            *([element("td", _rank(means[row.label]))] if of > 1 else []),
        )
        for row in comparison.rows
        if row.kind == "weights"
    ]
    note = (
        "1 is the best; equal scores share the mean of their places. The mean is over the columns"
        " that rank all weights."
    )
    table = html.table([element("th"), *heads], rows)
    return [element("h2", "Rank of the weights by task"), element("p", note), table]


def _rank(rank: float | None) -> str:
    return "" if rank is None else f"{rank:.3g}"


def _section(comparison: Comparison, number: int) -> Element:
    """Plots, numbers, settings and pictures of a column."""
    column = comparison.columns[number]
    cells = {row.label: row.cells[number] for row in comparison.rows if number in row.cells}
    same = [i for i, other in enumerate(comparison.columns) if other.task == column.task]
    place = f" ({same.index(number) + 1} of {len(same)})" if len(same) > 1 else ""
    plots = [html.plot_figure(plot) for plot in draw_column(comparison, number)]
    settings = html.definitions((name, _value(value)) for name, value in column.settings.items())
    pictures = [
        picture for label, cell in cells.items() for picture in _pictures(cell.report or {}, label)
    ]
    return element(
        "section",
        element("h2", column.task + place),
        *plots,
        *([_numbers(cells)] if any(cell.scores for cell in cells.values()) else []),
        *([_tests(comparison.tests[number])] if comparison.tests.get(number) else []),
        element("details", element("summary", "protocol and data"), settings),
        *pictures,
    )


def _numbers(cells: Mapping[str, Cell]) -> Element:
    """A table of every number of every score."""
    names = list(dict.fromkeys(n for cell in cells.values() for s in cell.scores for n in s))
    rows = [
        element(
            "tr",
            element("th", label, scope="row"),
            *(element("td", _number(cell, score, name)) for name in names),
        )
        for label, cell in cells.items()
        for score in cell.scores
    ]
    heads = [element("th", name, scope="col") for name in names]
    return html.table([element("th"), *heads], rows)


def _number(cell: Cell, score: Mapping[str, float], name: str) -> str:
    """A number of a score, with the interval that its report gives."""
    ends = ((cell.report or {}).get("intervals") or {}).get(name, ())
    said = f" ({ends[0]:.1f} to {ends[1]:.1f})" if len(ends) == 2 else ""
    return f"{score[name]:.2f}{said}" if name in score else ""


def _tests(tests: Sequence[PairedTest]) -> Element:
    """A table of the differences that were tested image by image."""
    heads = ("weights", "others", "only they are right", "only the others", "p", "difference")
    rows = [
        element(
            "tr",
            element("th", test.first, scope="row"),
            element("td", test.second),
            element("td", str(test.paired.only_first)),
            element("td", str(test.paired.only_second)),
            element("td", f"{test.p:.2g}"),
            element("td", test.verdict),
        )
        for test in tests
    ]
    note = (
        "McNemar's exact test on the images of the test set; p is corrected for the number of"
        " pairs (Holm). It says nothing of another training of the same weights."
    )
    table = html.table([element("th", head, scope="col") for head in heads], rows)
    return element("div", element("p", note), table)


def _pictures(report: Report, label: str) -> list[Element]:
    """Pictures of the task: its sheet, or the middle frames of some videos."""
    files = [report["picture"]] if isinstance(report.get("picture"), str) else []
    if report.get("task") == "video" and isinstance(report.get("out"), str):
        files = [str(path) for path in sorted(Path(report["out"]).glob("*.gif"))[:VIDEOS_SHOWN]]
    figures = []
    for file in files:
        picture = html.small_picture(Path(file))
        if picture is not None:
            name = f", {Path(file).stem}" if report["task"] == "video" else ""
            figures.append(html.picture_figure(picture, label + name))
    return figures
