"""The report of a run of several phases: one page that leads to the report of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from dinoscale.checkpoint.layout import phase_directories
from dinoscale.reports import html
from dinoscale.reports.html import element
from dinoscale.reports.run.chain import beginnings, draw_chain
from dinoscale.reports.run.guard import before_and_after, exported_of, known_of
from dinoscale.reports.run.read import CONFIG, METRICS, read_record
from dinoscale.reports.run.write import PAGE, report_of, write_run_report
from dinoscale.runtime.outputs import PHASES, run_name

_SHOWN = ("loss", "knn_top1", "patch_knn_top1")  # last values, where they were measured


def write_report(run_dir: Path, out: Path, *, attention: bool) -> dict[str, Any]:
    """Write the report of a run: of one part, or of all phases that have begun.

    Arguments and errors as for `write_run_report`.

    Returns:
        JSON-able: as `write_run_report`; of a run of phases `report`, the page, and `phases`, the
        same of each by the name of its folder.
    """
    phases = [
        phase
        for phase in phase_directories(run_dir)
        if (phase / CONFIG).exists() or (phase / METRICS).exists()  # else it still opens images
    ]
    if not phases:
        return write_run_report(run_dir, out, attention=attention)
    records = {phase.name: read_record(phase) for phase in phases}
    reports = {
        phase: report_of(record, out / PHASES / phase, attention=attention)
        for phase, record in records.items()
    }
    name, begun = run_name(run_dir), beginnings(records)
    shown = [value for value in _SHOWN if any(value in found["last"] for found in reports.values())]
    columns = ("phase", "", "after", "steps", *shown, "checks")
    rows = [
        _row(phase, report, after=begun[phase].after, shown=shown)
        for phase, report in reports.items()
    ]
    guarded = [record for record in records.values() if known_of(record) is not None]
    exported = exported_of(run_dir, records.values())
    body = [
        element("h1", f"Run {name}"),
        element("p", "Each phase began where an earlier one ended; its name leads to its report."),
        html.table([element("th", head, scope="col") for head in columns], rows),
        *(before_and_after(guarded[-1], exported) if guarded else []),
        *(html.plot_figure(plot) for plot in draw_chain(records, begun)),
    ]
    html.write_page(f"dinoscale: {name}", body, out / PAGE)
    return {"report": str(out / PAGE), "phases": reports}


def _row(phase: str, report: Mapping[str, Any], *, after: str, shown: Sequence[str]) -> Element:
    state, last = report["state"], report["last"]
    values = [last.get(name) for name in shown]
    checks = [*report["problems"], *report["warnings"]]
    link = element("a", phase, href=f"{PHASES}/{phase}/{PAGE}")
    return element(
        "tr",
        element("th", link, scope="row"),
        element("td", state["how"], class_="text"),
        element("td", after, class_="text"),
        element("td", f"{state['step']:,} of {state['stop_step'] or '?'}"),
        *(element("td", "" if value is None else f"{value['value']:.4g}") for value in values),
        element("td", "; ".join(checks) or "no warnings", class_="text"),
    )
