"""The page of a run: summary, checks, curves, attention maps and tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from dinoscale.checkpoint.retention import best_of
from dinoscale.cluster.doctor.report import Check, size_text
from dinoscale.config import RunConfig
from dinoscale.reports import html
from dinoscale.reports.html import Plot, element
from dinoscale.reports.run.guard import before_and_after, exported_of
from dinoscale.reports.run.read import Event, Record
from dinoscale.runtime.outputs import run_name

EVENTS_SHOWN = 100
_MAX_TEXT = 500  # characters of a cell


def build_body(
    record: Record,
    *,
    sentences: Sequence[str],
    checks: Sequence[Check],
    plots: Sequence[Plot],
    attention: Element,
) -> list[Element]:
    """The page from top to bottom.

    Args:
        record: record of the run.
        sentences: summary of the run.
        checks: results of all checks.
        plots: curves, in order.
        attention: attention maps of the teacher, or why there are none.
    """
    return [
        element("h1", f"Run {run_name(record.run_dir)}"),
        *(element("p", sentence) for sentence in sentences),
        element("ul", *map(_finding, checks), class_="checks"),
        *before_and_after(record, exported_of(record.run_dir, [record])),
        element("h2", "Curves"),
        *(html.plot_figure(plot) for plot in plots),
        *([] if plots else [element("p", "Nothing has been logged yet.")]),
        element("h2", "Self-attention of the teacher"),
        attention,
        element("h2", "Events"),
        *_events(record),
        element("h2", "Checkpoints"),
        _checkpoints(record),
        element("h2", "Settings"),
        *_settings(record),
        element("h2", "Versions"),
        html.definitions(record.versions.items()),
    ]


def _finding(check: Check) -> Element:
    return element(
        "li",
        element("b", check.verdict, class_=check.verdict),
        f" {check.name}: {check.text}",
    )


def _events(record: Record) -> Iterator[Element]:
    total = record.events.counts.total()
    if not total:
        yield element("p", "None: the run has not been interrupted.")
        return
    shown = list(record.events.newest)[-EVENTS_SHOWN:]
    if total > len(shown):
        yield element("p", f"The newest {len(shown)} of {total:,}; all are in events.jsonl.")
    rows = [
        element(
            "tr",
            element("th", event.time, scope="row"),
            element("td", f"{event.step:,}"),
            element("td", event.kind, class_="text"),
            element("td", _details(event), class_="text"),
        )
        for event in shown
    ]
    yield html.table(_heads("time", "step", text=("event", "details")), rows)


def _details(event: Event) -> str:
    found = [
        f"{name}: {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in event.details.items()
    ]
    text = "; ".join(found)
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 4]} ..."


def _checkpoints(record: Record) -> Element:
    found = record.checkpoints
    if not found:
        return element("p", "None in this directory.")
    best = best_of(found)
    rows = [
        element(
            "tr",
            element("th", f"{one.step:,}", scope="row"),
            element("td", "" if one.num_bytes is None else size_text(one.num_bytes)),
            element("td", one.saved_at or "unreadable"),
            element(
                "td",
                "" if one.knn_top1 is None else f"{one.knn_top1:.1f} %",
                **({"class_": "best"} if one is best else {}),
            ),
            element("td", one.guard_text, class_="text"),
        )
        for one in reversed(found)
    ]
    heads = _heads("step", "size", "saved at", "k-NN top-1", text=("guard",))
    return html.table(heads, rows)


def _settings(record: Record) -> Iterator[Element]:
    if record.config is not None:
        rows = [
            element(
                "tr",
                element("th", name, scope="row"),
                element("td", _value(value), class_="text"),
                element("td", _value(default), class_="text"),
            )
            for name, (value, default) in changed_settings(record.config).items()
        ]
        yield element("p", "Settings that differ from the defaults:")
        yield html.table(_heads("setting", text=("this run", "default")), rows)
    if record.config_text:
        text = element("pre", record.config_text)
        yield element("details", element("summary", "config.yaml"), text)


def changed_settings(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value, default) of every setting that is not at its default.

    Settings of a section that is null by default, such as `patch_head`, have the default null.
    """
    default = dict(_flat(RunConfig().model_dump(mode="json")))
    found = _flat(config.model_dump(mode="json"))
    pairs = {name: (value, default.get(name)) for name, value in found}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 4]} ..."


def _heads(*names: str, text: Sequence[str] = ()) -> list[Element]:
    """Column headers, text columns after numeric ones."""
    return [
        *(element("th", name, scope="col") for name in names),
        *(element("th", name, scope="col", class_="text") for name in text),
    ]
