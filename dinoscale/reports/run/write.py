"""Write the report of a run: curves, checks, k-NN, attention maps, events."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from dinoscale.cluster.doctor.report import Check
from dinoscale.errors import DinoscaleError
from dinoscale.reports import html
from dinoscale.reports.html import element
from dinoscale.reports.run.findings import check_run
from dinoscale.reports.run.page import build_body
from dinoscale.reports.run.plots import draw_run
from dinoscale.reports.run.read import CONFIG, Record, read_record
from dinoscale.reports.run.state import State, describe_run, find_state
from dinoscale.runtime.outputs import run_name

log = logging.getLogger(__name__)

PAGE, DATA, PLOTS, ATTENTION = "report.html", "report.json", "plots", "attention.png"
IMAGES_SHOWN = 4  # with attention maps


def write_run_report(run_dir: Path, out: Path, *, attention: bool) -> dict[str, Any]:
    """Write report.html, report.json and plots/*.png of a run into a folder.

    Args:
        run_dir: directory of a run, finished or not.
        out: folder of the report.
        attention: whether to draw attention maps of the teacher in the newest checkpoint.

    Returns:
        JSON-able: the paths and the last values.

    Raises:
        DataError: the directory is not that of a run.
        ConfigError: the report cannot be written.
    """
    return report_of(read_record(run_dir), out, attention=attention)


def report_of(record: Record, out: Path, *, attention: bool) -> dict[str, Any]:
    """The same of a record that has been read."""
    state = find_state(record, now=time.time())
    sentences, checks = describe_run(record, state), check_run(record, state)
    plots = draw_run(record, state)
    for name, plot in plots:
        html.write_file(out / PLOTS / f"{name}.png", plot.png)
    picture, why_not = _attention(record, out / ATTENTION, wanted=attention)
    numbers = _numbers(record, state, checks)
    numbers["attention"] = {"picture": ATTENTION if picture is not None else None, "why": why_not}
    body = build_body(
        record,
        sentences=sentences,
        checks=checks,
        plots=[plot for _, plot in plots],
        attention=element("p", why_not) if picture is None else picture,
    )
    html.write_page(f"dinoscale: {run_name(record.run_dir)}", body, out / PAGE)
    html.write_file(out / DATA, f"{json.dumps(numbers, indent=1)}\n".encode())
    return {
        "report": str(out / PAGE),
        "data": str(out / DATA),
        "plots": [str(out / PLOTS / f"{name}.png") for name, _ in plots],
        "state": numbers["state"],
        "last": numbers["last"],
        "problems": [check.text for check in checks if check.verdict == "problem"],
        "warnings": [check.text for check in checks if check.verdict == "warning"],
    }


def _attention(record: Record, path: Path, *, wanted: bool) -> tuple[Element | None, str]:
    """Attention maps, or why there are none; on the CPU, as the run may need its devices."""
    if not wanted:
        return None, "Not drawn (--no-attention)."
    if record.config is None:
        return None, f"Not drawn: the images are unknown without {CONFIG}."
    if not record.checkpoints:
        return None, "Not drawn: there is no checkpoint."
    config = record.config
    train = config.data.sources[0].source if config.data.sources else None
    spec = config.eval.test or train
    if spec is None:
        return None, "Not drawn: the run names no images."
    try:
        # These load torch.
        from dinoscale.evaluate.dense.attention import evaluate_attention
        from dinoscale.evaluate.frozen_backbone import LoadOptions

        count, options = IMAGES_SHOWN, LoadOptions(device="cpu")
        found = evaluate_attention(
            record.run_dir, spec, path, images=count, rows=count, scored=False, options=options
        )
    except DinoscaleError as error:
        return None, f"Not drawn: {error}"
    except Exception as error:  # a bug or a lack of memory must not cost the report
        log.exception("attention maps could not be drawn; this is a bug, or memory ran out")
        return None, f"Not drawn: {type(error).__name__}: {error}"
    png = html.small_picture(path)
    if png is None:
        return None, f"Not shown: {path} cannot be read."
    name = str(found["weights_source"]).rpartition("/")[2]
    caption = f"{name}: {found['images']} images of {spec} at {found['size']} pixels."
    return html.picture_figure(png, caption), ""


def _numbers(record: Record, state: State, checks: Sequence[Check]) -> dict[str, Any]:
    """The content of report.json."""
    series = {name: found for name, found in record.series.items() if found.last is not None}
    return {
        "run_dir": str(record.run_dir),
        "state": asdict(state),
        "trained_s": record.trained_s,
        "last": {name: found.last and found.last._asdict() for name, found in series.items()},
        "lowest": {name: found.lowest and found.lowest._asdict() for name, found in series.items()},
        "highest": {
            name: found.highest and found.highest._asdict() for name, found in series.items()
        },
        "logged": {name: found.count for name, found in series.items()},
        "events": dict(record.events.counts),
        "bad_images": record.bad_images,
        "checkpoints": [{**asdict(one), "path": str(one.path)} for one in record.checkpoints],
        "damaged_lines": dict(record.damaged),
        "missing_files": record.missing,
        "checks": [asdict(check) for check in checks],
    }
