"""The report of a run of several phases: one page that leads to the report of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from dinoscale.checkpoint.layout import phase_directories
from dinoscale.reports import html
from dinoscale.reports.html import element
from dinoscale.reports.run.read import CONFIG, METRICS
from dinoscale.reports.run.write import PAGE, write_run_report
from dinoscale.runtime.outputs import PHASES, run_name

_SHOWN = ("loss", "knn_top1")  # last values, where they were measured


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
    reports = {
        phase.name: write_run_report(phase, out / PHASES / phase.name, attention=attention)
        for phase in phases
    }
    name = run_name(run_dir)
    heads = [element("th", head, scope="col") for head in ("phase", "", "steps", *_SHOWN, "checks")]
    body = [
        element("h1", f"Run {name}"),
        element("p", "Each phase began where the one before ended; its name leads to its report."),
        html.table(heads, [_row(phase, report) for phase, report in reports.items()]),
    ]
    html.write_page(f"dinoscale: {name}", body, out / PAGE)
    return {"report": str(out / PAGE), "phases": reports}


def _row(phase: str, report: Mapping[str, Any]) -> Element:
    state, last = report["state"], report["last"]
    values = [last.get(name) for name in _SHOWN]
    checks = [*report["problems"], *report["warnings"]]
    link = element("a", phase, href=f"{PHASES}/{phase}/{PAGE}")
    return element(
        "tr",
        element("th", link, scope="row"),
        element("td", state["how"], class_="text"),
        element("td", f"{state['step']:,} of {state['stop_step'] or '?'}"),
        *(element("td", "" if value is None else f"{value['value']:.4g}") for value in values),
        element("td", "; ".join(checks) or "no warnings", class_="text"),
    )
