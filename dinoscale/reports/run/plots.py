"""The curves of a run over its steps, with events as vertical lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from dinoscale.reports.html import Plot, drawing, finish_plot, printable
from dinoscale.reports.run.guard import margin
from dinoscale.reports.run.read import Record
from dinoscale.reports.run.series import Point, Series, smooth
from dinoscale.reports.run.state import State
from dinoscale.training.hooks.data_wait import ALLOWED

KNN, PATCH_KNN = "k-NN top-1 of the teacher, %", "k-NN top-1 of the teacher's patches, %"
WIDTH, HEIGHT = 5.2, 2.8  # inches; two side by side on a page
GUARD = {
    "guard_rankme": "RankMe of held-out images, directions",
    "guard_lidar": "LiDAR of held-out images, directions",
    "guard_agreement": "share of nearest neighbours that are those of the start",
    "guard_alpha_req": "alpha-ReQ of held-out images",
}
_WINDOW = 20  # points of the moving average; at most a twentieth of all
_RANGE = 50.0  # highest over lowest value above which the axis is logarithmic
_LINE_POSITIONS = 300  # along the axis; events of one kind at one position share a line
_MANY_EVENTS = 12  # of one kind; the lines of more are short
_COLORS = matplotlib.colormaps["tab10"]
_MAIN, _RAW, _LIMIT = "#1f4e9c", "#9db8e6", "#666666"


@dataclass(frozen=True)
class _PlotSpec:
    """A plot of one series.

    Attributes:
        name: name in metrics.jsonl, and of the file.
        caption: what it shows, with its unit.
        scale: factor applied to the values.
        noisy: whether to add a smoothed line.
        dots: whether to mark every value, for sparse series.
        limits: (value, label) of dashed reference lines.
        from_zero: whether the axis starts at 0.
    """

    name: str
    caption: str
    scale: float = 1.0
    noisy: bool = False
    dots: bool = False
    limits: tuple[tuple[float, str], ...] = ()
    from_zero: bool = False


def draw_run(record: Record, state: State) -> list[tuple[str, Plot]]:
    """Draw every series that has data: (name, plot), in reading order."""
    drawn = []
    with drawing():
        for spec in _plot_specs(record):
            series = record.series[spec.name]
            if series.count:
                figure, axes = _figure(state)
                _draw(axes, series, spec)
                _mark_events(axes, record)
                _legend(axes)
                drawn.append((spec.name, finish_plot(figure, spec.caption)))
    return drawn


def _plot_specs(record: Record) -> list[_PlotSpec]:
    entropy = "teacher_entropy", "entropy of the teacher targets, nats"
    config = record.config
    bounds: tuple[tuple[float, str], ...] = ()
    if config is not None:
        prototypes = config.head.num_prototypes
        bounds = ((0.0, "0: one-hot"), (math.log(prototypes), f"ln {prototypes}: uniform"))
    return [
        _PlotSpec("loss", "loss, nats", noisy=True),
        _PlotSpec(
            "knn_top1",
            KNN,
            dots=True,
            limits=margin(record, "knn_top1"),
        ),
        _PlotSpec("patch_knn_top1", PATCH_KNN, dots=True),
        _PlotSpec("rankme", _rankme(record), dots=True),
        _PlotSpec("alpha_req", "alpha-ReQ of the teacher's features", dots=True),
        _PlotSpec(
            "guard_rankme",
            GUARD["guard_rankme"],
            dots=True,
            limits=margin(record, "guard_rankme"),
        ),
        _PlotSpec(
            "guard_lidar",
            GUARD["guard_lidar"],
            dots=True,
            limits=margin(record, "guard_lidar"),
        ),
        _PlotSpec(
            "guard_agreement",
            GUARD["guard_agreement"],
            dots=True,
            limits=margin(record, "guard_agreement"),
        ),
        _PlotSpec("guard_alpha_req", GUARD["guard_alpha_req"], dots=True),
        _PlotSpec(*entropy, noisy=True, limits=bounds, from_zero=True),
        _PlotSpec("kl", "KL(teacher || student), nats", noisy=True),
        _PlotSpec(
            "target_mutual_information",
            "mutual information of targets and images, nats",
            noisy=True,
            limits=((0.0, "0: all targets equal"),),
            from_zero=True,
        ),
        _PlotSpec(
            "max_prototype_prob",
            "targets assigned to the top prototype, %",
            scale=100,
            noisy=True,
            limits=((100.0, "100: collapse to one"),),
            from_zero=True,
        ),
        _PlotSpec("dino_loss", "loss of class tokens, nats", noisy=True),
        _PlotSpec("ibot_loss", "loss of masked patches, mean over all global crops", noisy=True),
        _PlotSpec("koleo_loss", "KoLeo loss, sum of both views", noisy=True),
        _PlotSpec("koleo_distance", "distance to the nearest class token", noisy=True),
        _PlotSpec("gram_loss", "Gram loss, 0 while it does not count", noisy=True),
        _PlotSpec(
            "anchor_class_loss",
            "1 - cosine to the anchor's class tokens",
            noisy=True,
            from_zero=True,
        ),
        _PlotSpec(
            "anchor_patch_loss",
            "1 - cosine to the anchor's patch tokens",
            noisy=True,
            from_zero=True,
        ),
        _PlotSpec(
            "class_feature_loss", "distance to the frozen teacher's class features", noisy=True
        ),
        _PlotSpec(
            "patch_feature_loss", "distance to the frozen teacher's patch features", noisy=True
        ),
        _PlotSpec(
            "patch_entropy", "entropy of the patch targets, nats", noisy=True, from_zero=True
        ),
        _PlotSpec(
            "patch_mutual_information",
            "mutual information of targets and patches, nats",
            noisy=True,
            limits=((0.0, "0: all targets equal"),),
            from_zero=True,
        ),
        _PlotSpec("lr", "learning rate"),
        _PlotSpec("weight_decay", "weight decay"),
        _PlotSpec("momentum", "teacher momentum"),
        _PlotSpec("teacher_temp", "teacher temperature"),
        _PlotSpec("local_weight", "weight of the local crops' loss"),
        _PlotSpec("grad_norm", "gradient norm", noisy=True),
        _PlotSpec("center_norm", "center norm"),
        _PlotSpec("images_per_s", "throughput, images/s", noisy=True, from_zero=True),
        _PlotSpec(
            "data_wait",
            "time waiting for data, %",
            scale=100,
            noisy=True,
            limits=((100 * ALLOWED, f"{ALLOWED:.0%}"),),
            from_zero=True,
        ),
        _PlotSpec("peak_memory_bytes", "peak memory of rank 0, GB", scale=1e-9, from_zero=True),
        _PlotSpec("save_stall_s", "training paused by a save, s", dots=True, from_zero=True),
    ]


def _rankme(record: Record) -> str:
    """The caption of RankMe, with the number of images, which limits it if all values have one."""
    images, known = record.series["rank_images"], record.series["rankme"].count
    of = ""
    if images.last and images.count == known:  # none of k-NN's, which is of other images
        of = f" (at most {images.last.value:.0f})"
    return f"RankMe of the teacher, directions{of}"


def _figure(state: State) -> tuple[Figure, Axes]:
    """Empty axes over the steps, with epochs on top where their length is known."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    last = max(state.step, 1)
    axes.set_xlim(-0.01 * last, 1.01 * last)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlabel("steps")
    axes.grid(axis="y", linewidth=0.4)
    if state.steps_per_epoch:
        per_epoch = state.steps_per_epoch
        to_epochs: Callable[[Any], Any] = lambda steps: steps / per_epoch  # noqa: E731
        to_steps: Callable[[Any], Any] = lambda epochs: epochs * per_epoch  # noqa: E731
        above = axes.secondary_xaxis("top", functions=(to_epochs, to_steps))
        above.set_xlabel("epochs", fontsize=8, color=_LIMIT)
        above.tick_params(labelsize=8, colors=_LIMIT)
        above.spines["top"].set_color(_LIMIT)
    return figure, axes


def _draw(axes: Axes, series: Series, spec: _PlotSpec) -> None:
    raw = _scaled(series.points(), spec.scale)
    means = _scaled(series.means(), spec.scale)
    window = min(_WINDOW, len(means) // 20)
    if spec.dots:
        axes.plot(*_columns(raw), color=_MAIN, linewidth=1, marker="o", markersize=3)
    elif spec.noisy and window > 1:
        axes.plot(*_columns(raw), color=_RAW, linewidth=0.6, label=" as logged")
        smoothed = smooth(means, window=window)
        axes.plot(*_columns(smoothed), color=_MAIN, linewidth=1.6, label=" smoothed")
    else:
        axes.plot(*_columns(raw), color=_MAIN, linewidth=1.4, marker="o" if len(raw) < 3 else "")
    values = [point.value for point in raw]
    if not spec.from_zero and min(values) > 0 and max(values) / min(values) > _RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # powers of ten would need math text
        axes.yaxis.set_minor_formatter(NullFormatter())
    limits = [value for value, _ in spec.limits]
    if spec.from_zero:
        axes.set_ylim(0, 1.1 * max(*values, *limits, 1e-9))
    for value, label in spec.limits:
        axes.axhline(value, color=_LIMIT, linewidth=0.9, linestyle="--")
        axes.annotate(
            label,
            (1, value),
            (-2, 2 if value == 0 else -2),  # within the axes
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom" if value == 0 else "top",
            fontsize=7.5,
            color=_LIMIT,
        )


def _scaled(points: Sequence[Point], scale: float) -> list[Point]:
    return [Point(point.step, point.value * scale) for point in points]


def _columns(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    return [point.step for point in points], [point.value for point in points]


def _mark_events(axes: Axes, record: Record) -> None:
    """Draw a line at every event, with one color per kind."""
    width = axes.get_xlim()[1]
    for number, kind in enumerate(sorted(record.events.counts)):
        places = {
            round(event.step / width * _LINE_POSITIONS): event.step
            for event in record.events.newest
            if event.kind == kind and event.step <= width
        }
        color = _COLORS((number + 1) % 10)  # blue is for the curves
        height = 1.0 if len(places) <= _MANY_EVENTS else 0.1  # many full lines would hide the curve
        for step in places.values():
            axes.axvline(step, ymax=height, color=color, linewidth=1, linestyle=":", zorder=0.5)
        if places:
            label = f" {printable(kind)} ({record.events.counts[kind]})"
            axes.add_line(Line2D([], [], color=color, linestyle=":", label=label))


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=7.5)
