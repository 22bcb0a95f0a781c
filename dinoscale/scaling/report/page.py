"""The page of a sweep: what to train next, how far to trust it, plots and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from dinoscale.cluster.doctor.report import count_text
from dinoscale.reports import html
from dinoscale.reports.html import Plot, element
from dinoscale.scaling.laws.laws import MetricFit
from dinoscale.scaling.number_text import number
from dinoscale.scaling.report.conclusions import (
    Conclusion,
    Reason,
    Trust,
    best_run,
    conclusions,
    fit_reasons,
    measured,
    runs_to_add,
    value_of,
)
from dinoscale.scaling.report.labels import exponential, flops, interval, metric_name
from dinoscale.scaling.report.preset import Recommendation
from dinoscale.scaling.report.tables import (
    cost,
    failed_table,
    runs_table,
    sections,
    version_differences,
    versions_list,
)
from dinoscale.scaling.sweep.table import Row

TRUST_TEXT = {
    Trust.GOOD: "Trust: good. No check found anything against it.",
    Trust.LIMITED: "Trust: limited. Use it as a direction, and check it with a cheaper run first.",
    Trust.LOW: "Trust: low. Do not spend a large budget on it yet.",
}
PLOT_NOTES = {
    "parameters": "Along a line only the model grows; the legend names what stays constant. A line"
    " that flattens calls for more images.",
    "images": "Along a line one model sees more images. A line that flattens calls for a larger"
    " model.",
    "flops": "All runs by cost. The gray line is the lowest value reached up to each cost; a star"
    " is the expected result at a budget.",
    "isoflop": "Runs of one color have equal cost: small models see many images, large models few."
    " The minimum of a curve is the best size at its cost.",
    "frontier": "Best size against budget. Dots are the minima of the isoFLOP curves, stars the"
    " recommended sizes.",
    "joint": "The closer a run is to the line, the better the law describes it.",
    "residuals": "Deviation of the runs from the joint law. A visible pattern means that the law"
    " misses an effect.",
    "rates": "Along a curve only the learning rate differs. A curve that is lowest at one end needs"
    " rates beyond it.",
    "curves": "The metric during training, for all runs including failed ones.",
}
SYMBOLS = (
    "y is the metric, N the number of parameters, D the number of images seen, C the FLOPs, and E"
    " the limit of y for infinite N and D. Confidence intervals of the law are given below the"
    " estimates; single runs scatter more widely."
)


def write_page(
    rows: Sequence[Row],
    fits: Sequence[MetricFit],
    plots: Mapping[str, Mapping[str, Plot]],
    recommended: Recommendation | str,
    path: Path,
) -> None:
    """Write the page.

    Args:
        rows: rows of the table.
        fits: one fit per metric.
        plots: metric -> kind -> plot.
        recommended: what to train next, or why there is no preset.
        path: path of the page.

    Raises:
        ConfigError: it cannot be written.
    """
    body = [
        element("h1", "Scaling sweep"),
        element("p", _summary(rows)),
        *(_conclusions(rows, fit) for fit in fits),
        *([] if fits else [element("p", "No metric was measured, so nothing can be fitted.")]),
        _preset(recommended),
        *_failed(rows),
        *(part for fit in fits for part in _metric(rows, fit, plots[fit.metric])),
        element("h2", "Runs"),
        element("p", "The lowest value of each metric is in bold."),
        runs_table(rows),
        element("h2", "Versions"),
        *_versions(rows),
    ]
    html.write_page("dinoscale: scaling sweep", body, path)


def _summary(rows: Sequence[Row]) -> str:
    failed = sum(row.status == "failed" for row in rows)
    took = cost(rows)
    sizes = sorted({row.parameters for row in rows})
    spread = f"{len(sizes)} sizes from {number(sizes[0])} to" if len(sizes) > 1 else "one size of"
    return (
        f"{len(rows) - failed} runs done, {failed} failed; {spread} {number(sizes[-1])}"
        f" parameters. Total training time: {number(took['hours'])} hours"
        f" ({number(took['rank_hours'])} process hours); total compute: {flops(took['flops'])}."
        " Lower is better for every metric. Prefixes: k = 10^3, M = 10^6, G = 10^9, T = 10^12,"
        " P = 10^15, E = 10^18, Z = 10^21. FLOPs count the floating-point operations of a whole"
        " training."
        if rows
        else "No run has ended yet."
    )


def _conclusions(rows: Sequence[Row], fit: MetricFit) -> Element:
    """What to train next for one metric."""
    found = conclusions(fit)
    title = element("h2", f"What to train next for the lowest {metric_name(fit.metric)}")
    parts = [part for conclusion in found for part in _budget(conclusion, fit)]
    if not found:
        parts = [_no_conclusion(rows, fit)]
    parts += [element("h3", "About the fit"), _reasons(fit_reasons(fit))]
    added = runs_to_add(rows, fit)
    if added:
        parts += [element("h3", "Runs that would tell more"), _list(added)]
    trust = max((conclusion.trust for conclusion in found[:1]), default=Trust.LOW)
    return element("section", title, *parts, class_=f"answer {trust.name.lower()}")


def _budget(conclusion: Conclusion, fit: MetricFit) -> list[Element]:
    best = conclusion.optimum
    sentence = (
        f"With {flops(best.flops)} ({exponential(best.flops)}), train a model of"
        f" {interval(best.parameters)} parameters on {interval(best.images)} images"
    )
    if conclusion.expected is not None:
        kind = " (prediction interval of one run)" if best.run else ""
        sentence += f"; expect a {metric_name(fit.metric)} of {interval(conclusion.expected)}{kind}"
    approach = {
        "joint": "From the joint law fitted to all runs",
        "isoflop": "From the minima among runs of equal cost",
    }[best.approach]
    return [
        element("p", sentence + ".", class_="says"),
        element(
            "p",
            element("strong", TRUST_TEXT[conclusion.trust], class_=conclusion.trust.name.lower()),
            f" {approach}. In parentheses: {100 * fit.confidence:g} % confidence intervals,"
            " unless marked otherwise.",
        ),
        _reasons(conclusion.reasons),
    ]


def _no_conclusion(rows: Sequence[Row], fit: MetricFit) -> Element:
    """State that the runs support no recommendation, and name the best run so far."""
    text = f"The runs do not support a recommendation for {fit.metric}."
    if fit.optima:
        text += " The intervals of the best size and number of images are unbounded."
    best = best_run(rows, fit.metric)
    if best is None:
        return element("p", f"{text} No run has a value of it.", class_="says")
    count = len(measured(rows, fit.metric))
    return element(
        "p",
        f"{text} The best of {count_text(count, 'measured run')} is {best.name}:"
        f" {number(best.parameters)} parameters, {number(best.images)} images, peak learning rate"
        f" {number(best.lr)}; {metric_name(fit.metric)}"
        f" {number(value_of(best, fit.metric), zeros=True)}.",
        class_="says",
    )


def _reasons(reasons: Sequence[Reason]) -> Element:
    marked = [
        element("li", reason.sentence, class_=reason.trust.name.lower()) for reason in reasons
    ]
    return element("ul", *marked)


def _list(sentences: Sequence[str]) -> Element:
    return element("ul", *(element("li", sentence) for sentence in sentences))


def _preset(recommended: Recommendation | str) -> Element:
    if isinstance(recommended, str):
        return element("p", f"There is no recommended.yaml: {recommended}.")
    size = recommended.size
    return element(
        "p",
        element("strong", "recommended.yaml"),
        " beside this page is ready to train. It holds, for the first budget above: width"
        f" {size.embed_dim}, depth {size.depth}, {size.num_heads} heads"
        f" ({number(size.parameters)} parameters), {number(recommended.images)} images, peak"
        f" learning rate {number(recommended.lr)} (from {recommended.lr_from}), and all other"
        f" settings of {recommended.nearest}.",
    )


def _failed(rows: Sequence[Row]) -> list[Element]:
    made = failed_table(rows)
    return [] if made is None else [element("h2", "Failed runs"), made]


def _metric(rows: Sequence[Row], fit: MetricFit, plots: Mapping[str, Plot]) -> list[Element]:
    tables = [part for title, made in sections(rows, fit) for part in (element("h3", title), made)]
    if not plots and not tables:
        return []
    return [
        element("h2", f"{fit.metric}: plots and laws"),
        *(html.plot_figure(plot, PLOT_NOTES[name]) for name, plot in plots.items()),
        element("p", SYMBOLS),
        *tables,
    ]


def _versions(rows: Sequence[Row]) -> list[Element]:
    differ = version_differences(rows)
    if not differ:
        return [element("p", "All runs used the same versions."), versions_list(rows)]
    warning = f"Runs differ in {', '.join(differ)}, which may explain differences between them."
    return [element("p", warning, class_="warning"), versions_list(rows)]
