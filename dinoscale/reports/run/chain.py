"""Measurements over all phases of a run, those that began at the same place side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from dinoscale.reports.html import Plot, drawing, finish_plot
from dinoscale.reports.run.plots import GUARD, HEIGHT, KNN, PATCH_KNN, WIDTH
from dinoscale.reports.run.read import Record
from dinoscale.reports.run.state import find_state

_MEASURED = {"patch_knn_top1": PATCH_KNN, "knn_top1": KNN, **GUARD}


@dataclass(frozen=True)
class Beginning:
    """Where a phase began.

    Attributes:
        after: the phase at whose end; empty for the first.
        steps: taken before, from that of the first phase on.
    """

    after: str
    steps: int


def beginnings(records: Mapping[str, Record]) -> dict[str, Beginning]:
    """Where each phase began, by the name of its folder.

    Args:
        records: of the phases that have begun, by the name of their folders, in order.
    """
    found: dict[str, Beginning] = {}
    ends: dict[str, int] = {}
    for name, record in records.items():
        train = None if record.config is None else record.config.train
        source = None if train is None else train.continue_from or train.init_from
        after = Path(source).name if source else ""
        after = after if after in found else ""
        found[name] = Beginning(after, ends.get(after, 0))
        ends[name] = found[name].steps + find_state(record, now=time.time()).step
    return found


def draw_chain(records: Mapping[str, Record], begun: Mapping[str, Beginning]) -> list[Plot]:
    """Draw what was measured over the steps of all phases.

    Args:
        records: of the phases, as for `beginnings`.
        begun: its result.
    """
    drawn = []
    with drawing():
        for series, caption in _MEASURED.items():
            figure = Figure(figsize=(1.5 * WIDTH, 1.3 * HEIGHT), layout="constrained")
            axes = figure.add_subplot()
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_xlabel("steps of all phases")
            axes.grid(axis="y", linewidth=0.4)
            for name, record in records.items():
                points = record.series[series].points()
                steps = [begun[name].steps + point.step for point in points]
                values = [point.value for point in points]
                if points:
                    axes.plot(steps, values, linewidth=1.2, marker="o", markersize=3, label=name)
            if axes.lines:
                figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8)
                drawn.append(finish_plot(figure, caption))
    return drawn
