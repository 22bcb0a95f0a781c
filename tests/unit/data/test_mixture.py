from pathlib import Path

import numpy as np
import pytest

from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.mixture import (
    MixedSource,
    open_sources,
    replacement_candidates,
    source_sizes,
)
from dinoscale.data.sources.synthetic import parse_synthetic
from dinoscale.errors import DataError
from tests.unit.data.conftest import jpeg

SPECS = [f"synthetic:shapes?images={count}&size=8&seed={count}" for count in (3, 1, 4)]


def test_parts_follow_one_another() -> None:
    source = open_sources(SPECS)
    assert len(source) == 8
    assert source_sizes(source) == [3, 1, 4]
    assert source.labels is None  # the classes of one part mean nothing in another
    whole = [(part, i) for part in map(parse_synthetic, SPECS) for i in range(len(part))]
    for index, (part, i) in enumerate(whole):
        assert source.path(index) == part.path(i)
        np.testing.assert_array_equal(source.picture(index).pixels(), part.picture(i).pixels())
    for index in (-1, 8):
        with pytest.raises(IndexError):
            source.path(index)


def test_replacements_come_from_the_same_part() -> None:
    source = open_sources(SPECS)
    assert [replacement_candidates(source, index) for index in (0, 2, 3, 4, 7)] == [
        *[range(3)] * 2,
        range(3, 4),
        *[range(4, 8)] * 2,
    ]
    assert replacement_candidates(parse_synthetic(SPECS[0]), 1) == range(3)


def test_one_source_stays_itself(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    source = open_sources([str(tmp_path)])
    assert isinstance(source, FolderSource)
    assert source_sizes(source) == [1]


def test_the_same_source_may_come_twice() -> None:
    source = open_sources([SPECS[0], SPECS[0]])
    assert isinstance(source, MixedSource)
    assert source.path(0) == source.path(3)


def test_a_part_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none does not exist"):
        open_sources([SPECS[0], str(tmp_path / "none")])
