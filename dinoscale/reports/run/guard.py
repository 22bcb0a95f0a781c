"""What the guard of a run found: the teacher before training, at its best and last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from dinoscale.checkpoint.progress import Guarded
from dinoscale.checkpoint.retention import Summary
from dinoscale.cluster.doctor.report import Check, ok, problem, warning
from dinoscale.reports import html
from dinoscale.reports.html import element
from dinoscale.reports.run.read import Record, exported_name

_WORDS = {
    "knn_top1": "k-NN top-1, %",
    "rankme": "RankMe, directions",
    "lidar": "LiDAR, directions",
    "alpha_req": "alpha-ReQ",
    "agreement": "nearest neighbours shared with the start",
}


def known_of(record: Record) -> Guarded | None:
    """What the newest checkpoint knows of the guard; None without one."""
    found = [one for one in record.checkpoints if one.guarded is not None]
    return max(found, key=lambda one: one.step).guarded if found else None


def margin(record: Record, series: str) -> tuple[tuple[float, str], ...]:
    """The line in the plot of a series below which the teacher has fallen, with its label."""
    known, config = known_of(record), record.config
    if known is None or config is None or config.guard.every_steps is None:
        return ()
    rule = config.guard
    if series == "guard_agreement":
        least = rule.min_agreement
        return ((least, f"{least:g}: guard.min_agreement"),) if least else ()
    best = known.best.get(known.measure)
    of_guard = known.measure in ("rankme", "lidar")
    if best is None or series != f"{'guard_' if of_guard else ''}{known.measure}":
        return ()
    return (((1 - rule.max_fall) * best, f"best - {rule.max_fall:.0%}"),)


def check_guard(record: Record) -> Iterator[Check]:
    """Whether the teacher has fallen; nothing without a guard."""
    name, known, count = "guard", known_of(record), record.events.counts["fall"]
    if count:
        last = record.events.last["fall"]
        ended = known is not None and not known.fall and known.step > last.step
        verdict, more = (warning, ", which has ended") if ended else (problem, "")
        yield verdict(name, f"{last.detail('text')}{more}")
    elif known is not None:
        yield ok(
            name,
            f"no fall; best at {known.best_text}, by {_WORDS.get(known.measure, 'k-NN')}",
        )


def exported_of(run_dir: Path, records: Iterable[Record]) -> Summary | None:
    """The checkpoint whose teacher the best weights in a folder are, as their card says."""
    name = exported_name(run_dir)
    found = (one for record in records for one in record.checkpoints)
    return next((one for one in found if "/".join(one.path.resolve().parts[-3:]) == name), None)


def before_and_after(record: Record, exported: Summary | None) -> list[Element]:
    """A table of every measure at the start, the best and the last measurement.

    A checkpoint that was exported, but is not that best one, has a column of its own. There is no
    last one where all is of the phase before.
    """
    known = known_of(record)
    if known is None:
        return []
    columns = [
        (f"start ({known.start_text})", known.start),
        (f"best ({known.best_text})", known.best),
        *([] if exported is None else _exported(exported, record, known)),
        *([] if known.step < 0 else [(f"last (step {known.step:,})", known.values)]),
    ]
    rows = [
        element(
            "tr",
            element("th", words, scope="row"),
            *(element("td", _number(values.get(name))) for _, values in columns),
        )
        for name, words in _WORDS.items()
        if any(name in values for _, values in columns)
    ]
    heads = [element("th", head, scope="col") for head in ("teacher", *(c for c, _ in columns))]
    images = element("p", f"Measured on {known.images}; the best by {_WORDS.get(known.measure)}.")
    return [element("h2", "Before and after"), images, html.table(heads, rows)]


def _exported(
    one: Summary, record: Record, known: Guarded
) -> Iterator[tuple[str, dict[str, float]]]:
    """The column of the exported checkpoint, if it is not the best of what the guard knows."""
    own, folder = record.run_dir.resolve().name, one.path.resolve().parent.parent.name
    if (folder, one.step) == (known.best_in or own, known.best_step):
        return
    here = [found for found in one.verdicts if found.step == one.step and found.compares(known)]
    values = dict(here[0].values) if here else {}
    if values.get("lidar_views") != known.values.get("lidar_views"):
        values.pop("lidar", None)  # of other views
    yield f"exported (step {one.step:,}{'' if folder == own else f' of {folder}'})", values


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
