"""Self-contained HTML pages, without scripts or network access, and the plots in them.

A page is built as a tree of elements, so that no text (file names, messages) can become markup. Its
content security policy allows a browser nothing but the embedded pictures and styles.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from PIL import Image, UnidentifiedImageError

from dinoscale.errors import ConfigError
from dinoscale.runtime.outputs import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MAX_WIDTH, MAX_HEIGHT = 1000, 1400  # pixels of an embedded picture
_NOT_PRINTABLE = re.compile(r"[^\t\n\x20-\ud7ff\ue000-\U0010ffff]")
_PLOTS = {
    "svg.fonttype": "path",  # independent of the installed fonts
    "svg.hashsalt": "dinoscale",
    "text.parse_math": False,  # names may contain dollar signs
    "font.size": 9,
}
_DPI = 150  # of a plot as PNG

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 75em;
  padding: 0 1.5em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin: 2.2em 0 .4em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8em 0; }
th, td { padding: .35em .9em; text-align: right; border-bottom: 1px solid #ddd;
  vertical-align: top; }
th { font-weight: 600; } thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.untrained, tr.floor, tr.untrained th, tr.floor th { color: #666; font-weight: normal; }
tr.weights + tr.untrained > *, tr.weights + tr.floor > * { border-top: 2px solid #888; }
td { font-variant-numeric: tabular-nums; }
td.best { font-weight: 700; background: #eaf5ea; }
td.error { color: #a11; text-align: left; max-width: 22em; font-size: .85em; }
small { display: block; font-weight: normal; color: #666; font-size: .82em; max-width: 22em;
  overflow-wrap: anywhere; }
small.warning { color: #a11; }
th small { text-align: inherit; }
figure { display: inline-block; margin: .6em 1.4em .6em 0; vertical-align: top; max-width: 100%; }
figcaption { color: #555; font-size: .9em; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1em 1.2em; font-size: .88em; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; color: #245; }
pre { overflow-x: auto; font-size: .85em; }
ul.checks { list-style: none; padding: 0; overflow-wrap: anywhere; }
ul.checks li { margin: .25em 0; }
b.ok { color: #276b2b; } b.warning { color: #8a5a00; } b.problem { color: #a11; }
h3 { font-size: 1em; margin: 1.4em 0 .3em; } ul { margin: .3em 0; padding-left: 1.4em; }
th.text, td.text { text-align: left; max-width: 45em; overflow-wrap: anywhere; }
th.name { min-width: 10em; max-width: 17em; overflow-wrap: anywhere; }
figcaption { max-width: 34em; }
figure.example { width: 8em; margin: .2em .6em .6em 0; }
figure.example figcaption { font-size: .75em; } td small { white-space: nowrap; }
p.warning { color: #a11; }
.answer, p { overflow-wrap: anywhere; }
.answer { border-left: .4em solid; background: #f7f7f7; padding: .6em 1.2em; margin: 1em 0; }
.answer h2 { margin-top: .2em; } .answer .says { font-size: 1.1em; font-weight: 600; }
.answer.good { border-color: #3a8a3a; } strong.good { color: #276b27; }
.answer.limited { border-color: #d59a1d; } strong.limited, li.limited { color: #8a5a00; }
.answer.low { border-color: #b33; } strong.low, li.low { color: #a11; }
"""


@dataclass(frozen=True)
class Plot:
    """A plot with its caption.

    Attributes:
        caption: what it shows, in one line.
        svg: the plot as SVG, for a page.
        png: the plot as PNG, for a file.
    """

    caption: str
    svg: bytes
    png: bytes


def printable(text: str) -> str:
    """Text with control characters and invalid code points, as in file names, replaced."""
    return _NOT_PRINTABLE.sub("\ufffd", text)


@contextmanager
def drawing() -> Iterator[None]:
    """A context to draw plots in: one style everywhere, equal bytes for equal numbers."""
    import matplotlib

    with matplotlib.rc_context(_PLOTS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters missing in the font become boxes
        yield


def finish_plot(figure: Figure, caption: str) -> Plot:
    """Title the first axes with the caption, remove frames, and save; call it in `drawing`."""
    figure.axes[0].set_title(caption, loc="left", fontsize=10, fontweight="bold")
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.set_layout_engine("none")  # which takes longer than drawing, and is done
    figure.savefig(png, format="png", dpi=_DPI)
    return Plot(caption, svg.getvalue(), png.getvalue())


def element(tag: str, *content: str | Element, **attributes: str) -> Element:
    """An element; the attribute `class` is spelled `class_`."""
    made = Element(tag, {name.rstrip("_"): printable(value) for name, value in attributes.items()})
    for part in content:
        if isinstance(part, Element):
            made.append(part)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + printable(part)
        else:
            made.text = (made.text or "") + printable(part)
    return made


def write_page(title: str, body: Sequence[Element], path: Path) -> None:
    """Write a page, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    policy = element("meta", content=POLICY)
    policy.set("http-equiv", "Content-Security-Policy")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        policy,
        element("meta", name="viewport", content="width=device-width"),
        element("title", title),
        element("style", _STYLE),
    )
    tree = element("html", head, element("body", *body), lang="en")
    markup = ElementTree.tostring(tree, encoding="unicode", method="html")
    write_file(path, f"<!DOCTYPE html>\n{markup}\n".encode())


def table(heads: Sequence[Element], rows: Sequence[Element]) -> Element:
    """A table that scrolls in a window too narrow for it."""
    content = element(
        "table",
        element("thead", element("tr", *heads)),
        element("tbody", *rows),
    )
    return element("div", content, class_="scroll")


def definitions(pairs: Iterable[tuple[str, str]]) -> Element:
    """A description list of (name, text) pairs."""
    parts = [
        element(tag, text) for pair in pairs for tag, text in zip(("dt", "dd"), pair, strict=True)
    ]
    return element("dl", *parts)


def plot_figure(plot: Plot, note: str = "") -> Element:
    """A plot in a page, with a note below it."""
    return _figure("svg+xml", plot.svg, plot.caption, note)


def picture_figure(png: bytes, caption: str) -> Element:
    """A picture in a page, with its caption below it."""
    return _figure("png", png, caption, caption)


def photograph_figure(jpeg: bytes | None, caption: str) -> Element:
    """A small photograph among others of a page, with its caption; None leaves its place empty."""
    if jpeg is None:
        figure = element("figure", element("figcaption", f"(no picture) {caption}"))
    else:
        figure = _figure("jpeg", jpeg, caption, caption)
    figure.set("class", "example")
    return figure


def _figure(kind: str, content: bytes, alt: str, caption: str) -> Element:
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    below = [element("figcaption", caption)] if caption else []
    return element("figure", element("img", src=source, alt=alt), *below)


def small_picture(path: Path) -> bytes | None:
    """A picture, or the middle frame of an animation, as a small PNG; None if unreadable."""
    try:
        with Image.open(path, formats=("PNG", "GIF")) as image:
            image.seek(getattr(image, "n_frames", 1) // 2)
            small = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    small.thumbnail((MAX_WIDTH, MAX_HEIGHT), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return file.getvalue()


def write_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; missing folders are created.

    Raises:
        ConfigError: it cannot be written.
        OutputError: a file that we did not write has its name.
    """
    try:
        with atomic_write(path) as beside:
            beside.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
