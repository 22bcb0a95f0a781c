"""The page of a deduplication by embeddings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.curation.embeddings import Embeddings
from data_tools.curation.groups import LADDER, Found, Grouped, Sets, Similar
from data_tools.curation.page import Example, Section, Strip, Table, classes_table, write_page
from data_tools.curation.search import Way
from data_tools.journal import Json

COPY = "a copy of an image that is kept"
NEAR_TEST = "similar to a test image"
WITH_NEAR = "in a group with such an image"
_KEPT = "kept"
_SHOWN = 15  # groups in a section of the page
_OF_A_GROUP = 8  # images of a group on the page


def write_copies_page(
    out: Path,
    sets: Sets,
    found: Found,
    grouped: Grouped,
    numbers: Json,
    similar: Similar,
    way: Way,
) -> None:
    """Write the page beside a list.

    Raises:
        ConfigError: it cannot be written.
    """
    whole = sets.whole
    how = "as faiss finds them, not all" if way.approximate else "of all"
    write_page(
        out,
        title=f"Copies in {whole.path.name}",
        said=[
            f"{numbers['kept']:,} of {len(whole):,} images are kept. Two images count as copies"
            f" if their cosine is at least {similar.threshold:g} and one is among the"
            f" {similar.k} nearest neighbours of the other ({how}). Of all images joined by such"
            " pairs the one with most pixels is kept.",
            "A threshold is right if the pairs that only just reach it, shown first, are copies.",
        ],
        tables=[
            _what_became(numbers),
            _thresholds(found),
            *classes_table(whole, grouped.kept),
        ],
        sections=[
            _section_of_weakest(whole, found),
            _section_of_largest(whole, grouped, found),
            *(
                _section_of_test(whole, test, *pairs, similar)
                for test, pairs in zip(sets.tests, found.tests, strict=True)
            ),
        ],
        settings={
            "embeddings": whole.path,
            "features": ", ".join(whole.features),
            "tests": ", ".join(str(test.path) for test in sets.tests) or "none",
            **asdict(similar),
            "approximate": way.approximate,
        },
        images={} if sets.images is None else {whole.path: sets.images},
    )


def _what_became(numbers: Json) -> Table:
    rows = [
        ("before", numbers["images"]),
        (COPY, numbers["copies"]),
        (NEAR_TEST, numbers["similar_to_a_test"]),
        (WITH_NEAR, numbers["in_a_group_with_these"]),
        (_KEPT, numbers["kept"]),
        ("groups of copies", numbers["groups"]),
        ("images of the largest group", numbers["largest_group"]),
    ]
    return Table("Images", ["", "images"], [[name, f"{count:,}"] for name, count in rows])


def _thresholds(found: Found) -> Table:
    rows = [
        [f"{cosine:g}", f"{count:,}", f"{100 * count / found.images:.2f} %"]
        for cosine, count in zip(LADDER, found.ladder.tolist(), strict=True)
    ]
    heads = ["cosine of the nearest other image", "images at or above", "share"]
    return Table("What other thresholds would join", heads, rows)


def _section_of_weakest(whole: Embeddings, found: Found) -> Section:
    """Pairs that only just reach the threshold."""
    strips, seen = [], set()
    for pair in np.argsort(found.cosines, kind="stable"):
        one, other = sorted(found.pairs[pair].tolist())
        if (one, other) not in seen:
            seen.add((one, other))
            title = f"cosine {found.cosines[pair]:.4f}"
            strips.append(Strip(title, [Example(whole, one), Example(whole, other)]))
        if len(strips) == _SHOWN:
            break
    said = "If these are no copies, take a larger threshold."
    return Section("Pairs that only just count as copies", said, strips)


def _section_of_largest(whole: Embeddings, grouped: Grouped, found: Found) -> Section:
    largest = np.lexsort((grouped.keepers, -np.diff(grouped.starts)))[:_SHOWN]
    strips = []
    for group in largest.tolist():
        keep, others = int(grouped.keepers[group]), grouped.copies_of(group)
        some = others[: _OF_A_GROUP - 1]
        copies = [Example(whole, row, f"left out, {found.closest[row]:.3f}") for row in some]
        strips.append(Strip(f"{1 + len(others):,} images", [Example(whole, keep, _KEPT), *copies]))
    said = (
        "The first of each is kept. The number below a copy is its largest cosine with an image of"
        " the group. Chains of pairs may join images that are not alike; then take a larger"
        " threshold."
    )
    return Section("Largest groups", said, strips)


def _section_of_test(
    whole: Embeddings,
    test: Embeddings,
    pairs: NDArray[np.int64],
    cosines: NDArray[np.float64],
    similar: Similar,
) -> Section:
    weakest = np.argsort(cosines, kind="stable")[:_SHOWN].tolist()
    strips = [
        Strip(
            f"cosine {cosines[place]:.4f}",
            [
                Example(whole, int(pairs[place, 0]), "left out"),
                Example(test, int(pairs[place, 1]), "test image"),
            ],
        )
        for place in weakest
    ]
    said = (
        f"{len(pairs):,} images have a cosine of at least {similar.against:g} with an image of"
        f" {test.path}. Those that only just reach it:"
    )
    return Section(f"Similar to {test.path.name}", said, strips)
