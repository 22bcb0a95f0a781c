"""The report page of a choice of images: numbers before and after, what was left out, examples."""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.curation.embeddings import Embeddings
from data_tools.curation.selection import Places
from data_tools.files import open_files
from data_tools.journal import require_writable
from dinoscale.data.decoding.decode import RGB, BadSampleError, Picture
from dinoscale.data.sources.image_files import read_image_file
from dinoscale.errors import DataError
from dinoscale.reports import html
from dinoscale.reports.html import element

log = logging.getLogger(__name__)

_SIDE = 112  # pixels of a photograph at most
_QUALITY = 85  # of its JPEG: some 4 KB
_SIZES = 50  # classes or clusters in a table; the rest are one row


@dataclass(frozen=True, eq=False)
class Example:
    """An image on the page.

    Attributes:
        of: the embeddings that it belongs to.
        row: its row in them.
        caption: what is said below it, after its name.
    """

    of: Embeddings
    row: int
    caption: str = ""


@dataclass(frozen=True, eq=False)
class Strip:
    """Images side by side, such as those of a cluster or a group of copies."""

    title: str
    examples: Sequence[Example]


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row says what the others are of."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, eq=False)
class Section:
    """Strips under a heading, with a sentence that says what they show."""

    title: str
    said: str
    strips: Sequence[Strip]


def page_of(path: Path) -> Path:
    """The page beside a list."""
    return path.with_suffix(".html")


def require_page(path: Path) -> None:
    """Find out before the work whether the page of a list can be written.

    Raises:
        DataError: it cannot.
        OutputError: something else is there.
    """
    require_writable(page_of(path))


def write_page(
    path: Path,
    *,
    title: str,
    said: Sequence[str],
    tables: Sequence[Table],
    sections: Sequence[Section],
    settings: Mapping[str, object],
    images: Mapping[Path, str] | None = None,
) -> None:
    """Write the page beside a list.

    Args:
        path: of the list; the page is NAME.html.
        title: what was done.
        said: paragraphs of text below it.
        tables: numbers before and after, and what was left out.
        sections: examples.
        settings: of the command.
        images: folder of embeddings -> folder where their images are now, if they have moved.

    Raises:
        ConfigError: it cannot be written.
        OutputError: something else is there.
    """
    shown = [one for part in sections for strip in part.strips for one in strip.examples]
    pictures = _Photographs(shown, images or {})
    body = [
        element("h1", title),
        *(element("p", text) for text in said),
        *(part for table in tables for part in _table(table)),
        *(part for section in sections if section.strips for part in _section(section, pictures)),
        element("h2", "Settings"),
        html.definitions((name, str(value)) for name, value in settings.items()),
    ]
    body[1:1] = [element("p", why, class_="warning") for why in pictures.missing]
    html.write_page(title, body, page_of(path))


def _table(table: Table) -> list[Element]:
    heads = [element("th", head, scope="col") for head in table.heads]
    rows = [
        element(
            "tr",
            element("th", first, scope="row"),
            *(element("td", cell) for cell in cells),
        )
        for first, *cells in table.rows
    ]
    return [element("h2", table.title), html.table(heads, rows)]


def _section(section: Section, pictures: _Photographs) -> Iterable[Element]:
    yield element("h2", section.title)
    yield element("p", section.said)
    for strip in section.strips:
        yield element("h3", strip.title)
        yield element("div", *(pictures.figure(one) for one in strip.examples))


class _Photographs:
    """Small pictures of examples, those of one folder of embeddings read together.

    Attributes:
        missing: sentences that say why some are not here.
    """

    def __init__(self, examples: Sequence[Example], images: Mapping[Path, str]) -> None:
        self.missing: list[str] = []
        self._photographs: dict[tuple[Path, int], bytes] = {}
        self._names: dict[tuple[Path, int], str] = {}
        for of in {one.of.path: one.of for one in examples}.values():
            rows = sorted({one.row for one in examples if one.of.path == of.path})
            names = of.names(np.array(rows, dtype=np.int64))
            self._names.update({(of.path, row): n for row, n in zip(rows, names, strict=True)})
            try:
                found = _photographs(of, names, images.get(of.path))
            except DataError as error:
                log.warning("the page has no pictures of %s: %s", of.path, error)
                self.missing.append(f"No pictures of {of.path}: {error}.")
                continue
            for row, photograph in zip(rows, found, strict=True):
                if photograph is not None:
                    self._photographs[of.path, row] = photograph

    def figure(self, example: Example) -> Element:
        """The picture of an example, or a line in its place, with name and caption below."""
        key = (example.of.path, example.row)
        name = "/".join(self._names[key].split("/")[-2:])
        caption = " ".join(part for part in (name, example.caption) if part)
        return html.photograph_figure(self._photographs.get(key), caption)


def _photographs(of: Embeddings, names: Sequence[str], images: str | None) -> list[bytes | None]:
    """A small JPEG of each image, None where it cannot be read now.

    Raises:
        DataError: no list can name the images, or their folder or shards are not there.
    """
    places = Places(of, images)
    lines = [places.line(name) for name in names]
    if not places.of_shards:
        paths = [os.fsdecode(line.rstrip(b"\n")) for line in lines]
        return [_small(partial(_picture_of_file, path)) for path in paths]
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        file.writelines(lines)
        file.flush()
        source = open_files(file.name)
    return [_small(partial(source.picture, number)) for number in range(len(names))]


def _picture_of_file(path: str) -> Picture:
    return RGB.open(read_image_file(path), path)


def _small(read: Callable[[], Picture]) -> bytes | None:
    try:
        small = Image.fromarray(read().pixels())
    except BadSampleError as error:
        log.warning("the page lacks a picture: %s", error)
        return None
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def classes_table(
    of: Embeddings, chosen: NDArray[np.int64], counts: NDArray[np.int64] | None = None
) -> list[Table]:
    """Images of each class before and after; no table for a set without classes.

    Args:
        of: embeddings of all images.
        chosen: rows of the chosen ones, (n,).
        counts: how often each is drawn, (n,); None: once.
    """
    labels = of.labels
    if labels is None or not (labels >= 0).any():
        return []
    number = max(len(of.class_names or []), int(labels.max()) + 1)
    names = of.class_names or [str(label) for label in range(number)]
    drawn = labels[chosen] if counts is None else np.repeat(labels[chosen], counts)
    before, after = (np.bincount(some[some >= 0], minlength=number) for some in (labels, drawn))
    return [sizes_table("Classes", names, before, after)]


def sizes_table(
    title: str, names: Sequence[str], before: NDArray[np.int64], after: NDArray[np.int64]
) -> Table:
    """Images of each class or cluster before and after, the largest first, and how even they are.

    The last row is exp H of the shares p, H = -sum p log p: so many of one size are as even.

    Args:
        title: what they are of.
        names: of the classes or clusters, (C,).
        before: how many images of each there were, (C,).
        after: how many lines each has in the list, (C,).
    """
    order = np.argsort(-before, kind="stable")
    rows = [[names[i], f"{before[i]:,}", f"{after[i]:,}"] for i in order[:_SIZES].tolist()]
    rest = order[_SIZES:]
    if len(rest):
        sums = f"{before[rest].sum():,}", f"{after[rest].sum():,}"
        rows.append([f"{len(rest):,} others", *sums])
    evenness = [f"{np.exp(entropy(sizes)):.1f}" for sizes in (before, after)]
    rows.append(["as even as so many of one size", *evenness])
    return Table(title, ["", "before", "after"], rows)


def entropy(sizes: NDArray[np.int64]) -> float:
    """H = -sum p log p over the shares of these sizes, in nats."""
    p = sizes[sizes > 0] / sizes.sum()
    return float(-(p * np.log(p)).sum())
