"""Leave out copies by embeddings: of images of the same set, and of images of test sets.

What counts as a copy, and what is kept, is in `groups`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.curation.duplicates_page import WITH_NEAR, write_copies_page
from data_tools.curation.embeddings import open_embeddings, verify
from data_tools.curation.groups import LADDER, Found, Grouped, Sets, Similar, decide, groups_in
from data_tools.curation.neighbours import ROUNDING, require_comparable
from data_tools.curation.page import page_of, require_page
from data_tools.curation.search import (
    Searched,
    Way,
    in_turns,
    joined,
    journal_beside,
    packed,
    settings_of,
    spans_of,
)
from data_tools.curation.selection import (
    record_of,
    require_lines,
    require_list,
    write_selection,
)
from data_tools.journal import Json, require_writable, write_whole
from dinoscale.errors import DataError
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import code_fingerprint, fingerprint
from dinoscale.runtime.opening import on_first_rank

log = logging.getLogger(__name__)

_LARGE = 0.1  # share of all images in one group that is said aloud


def groups_of(path: Path) -> Path:
    """The file of the groups beside a list."""
    return path.with_suffix(".jsonl")


def deduplicate_embeddings(
    folder: Path,
    out: Path,
    *,
    against: Sequence[Path],
    similar: Similar,
    way: Way,
    features: Sequence[str] = (),
    images: str | None = None,
    progress: bool = True,
) -> Json:
    """Write the list of images without copies, the groups of copies, and a page; on all ranks.

    Args:
        folder: embeddings of the images.
        out: the list, NAME.txt; beside it are NAME.json, the groups NAME.jsonl, and NAME.html.
        against: embeddings of test sets.
        similar: which images count as copies.
        way: how neighbours are searched.
        features: as `open_embeddings` takes them.
        images: folder of the images, if it has moved.
        progress: show a bar.

    Returns:
        The summary, ready for JSON.

    Raises:
        ConfigError: faiss is asked for and not there.
        DataError: embeddings cannot be read or compared, have changed since they were written,
            nothing is left, or a file cannot be written.
        OutputError: something else has the name of a file.
    """

    def opened() -> Sets:
        whole = open_embeddings(folder, features=features)
        sets = Sets(whole, [open_embeddings(path, features=features) for path in against], images)
        for test in sets.tests:
            require_comparable(whole, test)
        _require_files(out, sets)
        return sets

    sets = distributed.together(opened)
    require_lines(sets.whole, sets.images)
    work = fingerprint(
        input={"images": sets.whole.digest, "tests": [test.digest for test in sets.tests]},
        command={**asdict(similar), **settings_of(way)},
        code=code_fingerprint(__name__),
    )
    search = _Search(sets, similar, way)
    with journal_beside(out, work) as journal:
        verify(sets.whole, *sets.tests)
        results = in_turns(search.piece, search.sizes, journal, progress=progress)
        summary = on_first_rank(lambda _: _written(sets, search.joined(results), similar, way, out))
    return distributed.broadcast_object(summary) or {}


def _require_files(out: Path, sets: Sets) -> None:
    """Refuse what could not be written, on the first rank."""
    if not distributed.rank():
        require_list(out, sets.whole, *sets.tests)
        require_page(out)
        require_writable(groups_of(out))


class _Search:
    """The pieces of the search: every block of the set in itself, then in each test set."""

    def __init__(self, sets: Sets, similar: Similar, way: Way) -> None:
        self._whole, self._similar = sets.whole, similar
        exact = replace(way, approximate=False)  # an image of a test set must not be missed
        tests = [Searched(test, exact) for test in sets.tests]
        self._searched = [Searched(sets.whole, way), *tests]
        self._spans = spans_of(len(sets.whole), way.block)
        self.sizes = [len(span) for span in self._spans] * len(self._searched)

    def piece(self, number: int) -> Json:
        """What is similar to the images of a block."""
        base, block = divmod(number, len(self._spans))
        span = self._spans[block]
        own = (self._similar.threshold, self._similar.k)
        least, k = (self._similar.against, 1) if base else own
        found = self._searched[base].nearest(self._whole, span, k=k, at_least=least)
        query, place = np.nonzero(found.rows >= 0)
        pairs = np.stack([query + span.start, found.rows[query, place]], axis=1)
        ladder = [int((found.closest >= cosine - ROUNDING).sum()) for cosine in LADDER]
        return {
            "pairs": packed(pairs),
            "cosines": packed(found.cosines[query, place]),
            "full": int((found.rows[:, -1] >= 0).sum()),
            "ladder": ladder,
        }

    def joined(self, results: Sequence[Json]) -> Found:
        """The results of all pieces together."""
        blocks = len(self._spans)
        parts = [results[first : first + blocks] for first in range(0, len(results), blocks)]
        (own, *tests) = map(_pairs, parts)
        return Found(
            len(self._whole),
            *own,
            full=sum(result["full"] for result in parts[0]),
            ladder=np.sum([result["ladder"] for result in parts[0]], axis=0),
            tests=tests,
        )


def _pairs(results: Sequence[Json]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pairs (P, 2) and their cosines."""
    pairs = joined(results, "pairs", np.int64).reshape(-1, 2)
    return pairs, joined(results, "cosines", np.float64)


def _written(sets: Sets, found: Found, similar: Similar, way: Way, out: Path) -> Json:
    """Write all files, and return the summary.

    Raises:
        DataError: nothing is left, or a file cannot be written.
    """
    whole, groups = sets.whole, groups_in(found)
    grouped = decide(found, groups, whole.pixels(groups.rows))
    if not len(grouped.kept):
        raise DataError(
            f"--against-threshold {similar.against:g}: every image is similar to a test image or"
            " joined to one that is, and none is left; take a larger one"
        )
    numbers = _numbers(sets, found, grouped)
    about = {
        "command": "deduplicate-embeddings",
        "settings": {**asdict(similar), "approximate": way.approximate},
        "tests": [{"path": str(test.path), "digest": test.digest} for test in sets.tests],
        "numbers": numbers,
    }
    write_whole(groups_of(out), _lines(sets, found, grouped))
    write_copies_page(out, sets, found, grouped, numbers, similar, way)
    record = write_selection(out, whole, grouped.kept, about=about, images=sets.images)
    if found.full:
        log.warning(
            "all %d neighbours of %d images are similar: there may be copies that were not"
            " compared. Take more --neighbours, unless the groups are large anyway",
            *(similar.k, found.full),
        )
    if numbers["largest_group"] > max(_LARGE * numbers["images"], similar.k):
        log.warning(
            "one group of copies has %d of all %d images: pair by pair, images that are no copies"
            " may have been joined. Look at %s, and take a larger --threshold, or features that"
            " tell these images apart",
            *(numbers["largest_group"], numbers["images"], page_of(out)),
        )
    return {
        "list": str(out),
        "record": str(record_of(out)),
        "groups_file": str(groups_of(out)),
        "page": str(page_of(out)),
        "train_on": record["train_on"],
        **numbers,
    }


def _numbers(sets: Sets, found: Found, grouped: Grouped) -> Json:
    """Numbers before and after."""
    of_tests = zip(sets.tests, found.tests, strict=True)
    return {
        "images": len(sets.whole),
        "groups": len(grouped.keepers),
        "largest_group": 1 + int(np.diff(grouped.starts).max(initial=0)),
        "copies": len(grouped.copies),
        "similar_to_tests": {str(test.path): len(pairs) for test, (pairs, _) in of_tests},
        "similar_to_a_test": len(grouped.near),
        "in_a_group_with_these": len(grouped.beside),
        "all_neighbours_similar": found.full,
        "kept": len(grouped.kept),
    }


def _lines(sets: Sets, found: Found, grouped: Grouped) -> Iterator[bytes]:
    """Groups of copies, then what is similar to test images, a JSON object each."""
    keepers, names = sets.whole.names(grouped.keepers), iter(sets.whole.names(grouped.copies))
    for group, keep in enumerate(keepers):
        copies = [
            {"path": next(names), "cosine": round(float(found.closest[row]), 6)}
            for row in grouped.copies_of(group)
        ]
        yield _line({"keep": keep, "duplicates": copies})
    for test, (pairs, cosines) in zip(sets.tests, found.tests, strict=True):
        ours, theirs = sets.whole.names(pairs[:, 0]), test.names(pairs[:, 1])
        for name, other, cosine in zip(ours, theirs, cosines.tolist(), strict=True):
            nearest = {"test": other, "of": str(test.path), "cosine": round(cosine, 6)}
            yield _line({"path": name, **nearest})
    for name in sets.whole.names(grouped.beside):
        yield _line({"path": name, "because": WITH_NEAR})


def _line(entry: Json) -> bytes:
    return json.dumps(entry).encode() + b"\n"
