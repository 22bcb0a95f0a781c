"""Write the report of a sweep: page, plots, numbers, and the preset to train next."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dinoscale.errors import ConfigError
from dinoscale.reports import html
from dinoscale.runtime.outputs import is_ours
from dinoscale.scaling.laws.laws import MetricFit
from dinoscale.scaling.report.conclusions import best_run, conclusions, fit_reasons, runs_to_add
from dinoscale.scaling.report.fit_text import as_json, plain
from dinoscale.scaling.report.page import write_page
from dinoscale.scaling.report.plots import draw_metric
from dinoscale.scaling.report.preset import Recommendation, recommend
from dinoscale.scaling.report.tables import cost, outliers, version_differences
from dinoscale.scaling.sweep.table import Row

PAGE, DATA, PRESET, PLOTS = "report.html", "report.json", "recommended.yaml", "plots"


def write_report(rows: Sequence[Row], fits: Sequence[MetricFit], out: Path) -> dict[str, Any]:
    """Write report.html, report.json, recommended.yaml and plots/*.png into a folder.

    Without a supported optimum there is no recommended.yaml, and that of an earlier report is
    removed.

    Returns:
        JSON-able: the paths and the recommendation.

    Raises:
        ConfigError: a file cannot be written.
    """
    recommended = _recommended(rows, fits)
    plots = {fit.metric: draw_metric(rows, fit) for fit in fits}
    paths: dict[str, Any] = {"page": str(out / PAGE), "data": str(out / DATA), "plots": []}
    for number, (metric, drawn) in enumerate(plots.items(), start=1):
        for name, plot in drawn.items():
            path = out / PLOTS / f"{number}-{_letters(metric)}-{name}.png"
            html.write_file(path, plot.png)
            paths["plots"].append(str(path))
    recommendation = _write_preset(recommended, out / PRESET)
    write_page(rows, fits, plots, recommended, out / PAGE)
    data = _data(rows, fits)
    data["recommendation"] = recommendation
    content = json.dumps(plain(data), indent=1, allow_nan=False)
    html.write_file(out / DATA, f"{content}\n".encode())
    return {**paths, "recommendation": plain(recommendation)}


def _recommended(rows: Sequence[Row], fits: Sequence[MetricFit]) -> Recommendation | str:
    try:
        return recommend(rows, fits)
    except ConfigError as error:
        return str(error)


def _letters(metric: str) -> str:
    """A metric's name, which may be any text, made fit for a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", metric)[:40]


def _write_preset(recommended: Recommendation | str, path: Path) -> dict[str, Any]:
    """Write the preset, or remove that of an earlier report.

    Raises:
        ConfigError: it cannot be written, or a file that we did not write has its name.
    """
    theirs = not is_ours(path)
    if isinstance(recommended, str):
        stale = path.exists() and not theirs
        if stale:
            _remove(path)
        return {"preset": None, "why_not": recommended, "removed_earlier": stale}
    if theirs:
        raise ConfigError(f"{path}: not written by a report; move it away")
    html.write_file(path, recommended.preset.encode())
    return {"preset": str(path), **recommended.as_json()}


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be removed ({error.strerror})") from error


def _data(rows: Sequence[Row], fits: Sequence[MetricFit]) -> dict[str, Any]:
    return {
        "cost": cost(rows),
        "version_differences": version_differences(rows),
        "answers": {fit.metric: _answers(rows, fit) for fit in fits},
        "fits": as_json(fits) if fits else {},
        "runs": [asdict(row) for row in rows],
    }


def _answers(rows: Sequence[Row], fit: MetricFit) -> dict[str, Any]:
    best = best_run(rows, fit.metric)
    return {
        "best_measured_run": best.name if best else None,
        "budgets": [
            {
                **asdict(conclusion.optimum),
                "expected": asdict(conclusion.expected) if conclusion.expected else None,
                "trust": conclusion.trust.name.lower(),
                "reasons": [reason.sentence for reason in conclusion.reasons],
            }
            for conclusion in conclusions(fit)
        ],
        "reasons": [reason.sentence for reason in fit_reasons(fit)],
        "runs_to_add": runs_to_add(rows, fit),
        "far_from_the_joint_law": outliers(fit),
    }
