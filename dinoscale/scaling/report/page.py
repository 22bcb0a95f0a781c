"""The page of a sweep: what to train next and how far to trust it, plots, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from dinoscale.reports import html
from dinoscale.reports.html import Plot, element
from dinoscale.scaling.laws.laws import MetricFit
from dinoscale.scaling.number_text import number
from dinoscale.scaling.report.conclusions import (
    Answer,
    Reason,
    Trust,
    answers,
    best_run,
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

VERDICTS = {
    Trust.GOOD: "Trust: good. Nothing found speaks against it.",
    Trust.LIMITED: "Trust: limited. Use it as a direction and check it with one cheaper run.",
    Trust.LOW: "Trust: low. Do not spend a large budget on it yet.",
}
EXPLAINED = {
    "parameters": "Going right along a line, the model grows and what the legend names stays. Lines"
    " that flatten want more images.",
    "images": "Going right along a line, one model sees more images. Lines that flatten want a"
    " larger model.",
    "flops": "All runs by their cost. Gray is the lowest value that any cost has reached; a star is"
    " what to expect of a budget.",
    "isoflop": "Runs of a color cost the same: small models see many images, large ones few. The"
    " lowest point of a curve is the best size for its cost.",
    "frontier": "How the best size grows with the budget. Dots are the lowest points of the curves"
    " of equal cost, stars what is recommended.",
    "joint": "The closer to the line, the better the law describes a run.",
    "residuals": "How far runs are from the joint law. A pattern here means that the law misses"
    " something.",
    "rates": "Only the learning rate differs along a curve. One that is lowest at an end needs"
    " rates beyond it.",
    "curves": "While the runs trained, failed ones too.",
}
SYMBOLS = (
    "Below, y is the metric, N the parameters, D the images seen, C the FLOPs; E is the floor that"
    " no size and no number of images would get below. Below the estimates are their confidence"
    " intervals; one run scatters more than they are wide."
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
        rows: of the table.
        fits: of the metrics.
        plots: by metric and what is shown.
        recommended: what to train next, or why there is no such preset.
        path: of the page.

    Raises:
        ConfigError: it cannot be written.
    """
    body = [
        element("h1", "Scaling sweep"),
        element("p", _summary(rows)),
        *(_answer(rows, fit) for fit in fits),
        *([] if fits else [element("p", "No metric was measured, so nothing can be fitted.")]),
        _preset(recommended),
        *_failed(rows),
        *(part for fit in fits for part in _metric(rows, fit, plots[fit.metric])),
        element("h2", "Runs"),
        element("p", "The lowest value of each metric is bold."),
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
        f"{len(rows) - failed} runs are done, {failed} failed; {spread} {number(sizes[-1])}"
        f" parameters. All together trained {number(took['hours'])} hours"
        f" ({number(took['rank_hours'])} process hours), {flops(took['flops'])}. Of every metric"
        " less is better. In numbers, k is 10^3, M 10^6, G 10^9, T 10^12, P 10^15, E 10^18, Z"
        " 10^21; FLOPs are the floating-point operations of a whole training."
        if rows
        else "No run has ended yet."
    )


def _answer(rows: Sequence[Row], fit: MetricFit) -> Element:
    """What to do, for one metric."""
    found = answers(fit)
    title = element("h2", f"What to train next for the lowest {metric_name(fit.metric)}")
    parts = [part for answer in found for part in _budget(answer, fit)]
    if not found:
        parts = [_nothing(rows, fit)]
    parts += [element("h3", "About the fit"), _reasons(fit_reasons(fit))]
    added = runs_to_add(rows, fit)
    if added:
        parts += [element("h3", "Runs that would tell more"), _list(added)]
    trust = max((answer.trust for answer in found[:1]), default=Trust.LOW)
    return element("section", title, *parts, class_=f"answer {trust.name.lower()}")


def _budget(answer: Answer, fit: MetricFit) -> list[Element]:
    best = answer.optimum
    sentence = (
        f"With {flops(best.flops)} ({exponential(best.flops)}), train a model of"
        f" {interval(best.parameters)} parameters on {interval(best.images)} images"
    )
    if answer.expected is not None:
        kind = " (prediction interval of one run)" if best.run else ""
        sentence += f"; expect a {metric_name(fit.metric)} of {interval(answer.expected)}{kind}"
    approach = {
        "joint": "From the law fitted to all runs",
        "isoflop": "From the minima among runs of equal cost",
    }[best.approach]
    return [
        element("p", sentence + ".", class_="says"),
        element(
            "p",
            element("strong", VERDICTS[answer.trust], class_=answer.trust.name.lower()),
            f" {approach}; in brackets {100 * fit.confidence:g} % confidence intervals"
            " where nothing else is said.",
        ),
        _reasons(answer.reasons),
    ]


def _nothing(rows: Sequence[Row], fit: MetricFit) -> Element:
    """That there is no fit to decide by, and what was best so far."""
    said = f"The runs do not support a recommendation for {fit.metric}."
    if fit.optima:
        said += " Their best size and number of images have no bounds."
    best = best_run(rows, fit.metric)
    if best is None:
        return element("p", f"{said} No run has measured it.", class_="says")
    count = len(measured(rows, fit.metric))
    return element(
        "p",
        f"{said} The best measured of {count} is {best.name}: {number(best.parameters)}"
        f" parameters, {number(best.images)} images, peak learning rate {number(best.lr)};"
        f" {metric_name(fit.metric)} {number(value_of(best, fit.metric), zeros=True)}.",
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
        " beside this page is ready to train: for the first budget above, width"
        f" {size.embed_dim}, depth {size.depth}, {size.num_heads} heads"
        f" ({number(size.parameters)} parameters), {number(recommended.images)} images, peak"
        f" learning rate {number(recommended.lr)} from {recommended.lr_from}, and all other"
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
        *(html.plot_figure(plot, EXPLAINED[name]) for name, plot in plots.items()),
        element("p", SYMBOLS),
        *tables,
    ]


def _versions(rows: Sequence[Row]) -> list[Element]:
    differ = version_differences(rows)
    if not differ:
        return [element("p", "The same for all runs."), versions_list(rows)]
    warning = f"Runs differ in {', '.join(differ)}: a difference among them may come from that."
    return [element("p", warning, class_="warning"), versions_list(rows)]
