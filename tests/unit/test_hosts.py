"""Ranks in words, by host."""

import pytest

from dinoscale.runtime.hosts import ranks_text, span_text

HOSTS = [host for host in "abcdef" for _ in range(4)]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0-1"),
        ([0, 1, 2, 5, 7, 8], "ranks 0-2, 5, 7-8"),
    ],
)
def test_consecutive_ranks_are_a_span(ranks: list[int], text: str) -> None:
    assert span_text(ranks) == text


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        (range(4), "ranks 0-3 (a)"),
        ([1, 6, 7], "rank 1 (a), ranks 6-7 (b)"),
        (range(0, 24, 4), "rank 0 (a), rank 4 (b), rank 8 (c), rank 12 (d) and 2 more hosts"),
    ],
)
def test_ranks_are_named_with_their_hosts(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks, HOSTS) == text
