"""Which rank is named when a job hangs or has lost one."""

from dinoscale.watchdog import Sign, explain_hang, explain_missing

WAITS = Sign(moves=9, doing="in step 5", posts=40)
STILL = Sign(moves=9, doing="in step 5", posts=42)
BEHIND = Sign(moves=8, doing="waiting for the images of step 5", posts=42)


def test_rank_that_is_behind_is_named_with_what_it_does() -> None:
    said = explain_hang([WAITS, WAITS, WAITS], [STILL, BEHIND, STILL])
    assert said == "rank 1 is behind the others, waiting for the images of step 5"


def test_rank_that_does_not_answer_is_named() -> None:
    said = explain_hang([WAITS, WAITS], [STILL, WAITS])
    assert said == "rank 1 does not answer, it was in step 5"
    assert "rank 1 does not answer, it was starting" in explain_hang([WAITS, None], [STILL, None])


def test_without_any_answer_rank_0_is_named() -> None:
    assert "rank 0" in explain_hang([None, None], [None, None])
    assert "rank 0" in explain_missing([None, None], [None, None], [None, None])


def test_ranks_that_wait_for_each_other_are_not_blamed() -> None:
    assert "none is ahead" in explain_hang([WAITS, WAITS], [STILL, STILL])


def test_reason_of_a_rank_that_ended_is_repeated() -> None:
    said = explain_missing([WAITS, WAITS], [STILL, WAITS], [None, "no image in /data"])
    assert said == "rank 1 ended: no image in /data"


def test_rank_that_is_gone_is_named() -> None:
    said = explain_missing([WAITS, WAITS], [STILL, WAITS], [None, None])
    assert said == "rank 1 is gone, it was in step 5"


def test_if_all_ranks_answer_the_network_is_named() -> None:
    assert "network" in explain_missing([WAITS, WAITS], [STILL, STILL], [None, None])
