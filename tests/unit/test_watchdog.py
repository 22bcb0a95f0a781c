"""Which rank, and which host, is named when a job hangs or has lost one."""

from dinoscale.watchdog import Sign, explain_hang, explain_missing

WAITS = Sign(moves=9, doing="in step 5", posts=40)
STILL = Sign(moves=9, doing="in step 5", posts=42)
BEHIND = Sign(moves=8, doing="waiting for the images of step 5", posts=42)
HOSTS = ["a", "b"]
TWO_NODES = ["a", "a", "b", "b"]


def test_rank_that_is_behind_is_named_with_what_it_does() -> None:
    said = explain_hang([WAITS, WAITS, WAITS], [STILL, BEHIND, STILL], ["a", "b", "c"])
    assert said == "rank 1 (b) is behind the others, waiting for the images of step 5"


def test_rank_that_does_not_answer_is_named() -> None:
    said = explain_hang([WAITS, WAITS], [STILL, WAITS], HOSTS)
    assert said == "rank 1 (b) does not answer, it was in step 5"
    said = explain_hang([WAITS, None], [STILL, None], HOSTS)
    assert said == "rank 1 (b) does not answer, it was starting"


def test_without_any_answer_rank_0_and_its_host_are_named() -> None:
    assert "rank 0 (a)" in explain_hang([None, None], [None, None], HOSTS)
    assert "rank 0 (a)" in explain_missing([None, None], [None, None], HOSTS)


def test_ranks_that_wait_for_each_other_are_not_blamed() -> None:
    assert "none is ahead" in explain_hang([WAITS, WAITS], [STILL, STILL], HOSTS)


def test_rank_that_is_gone_is_named() -> None:
    said = explain_missing([WAITS, WAITS], [STILL, WAITS], HOSTS)
    assert said == "rank 1 (b) is gone, it was in step 5"


def test_node_that_is_gone_is_one_phrase() -> None:
    before, after = [WAITS] * 4, [STILL, STILL, WAITS, WAITS]
    said = explain_missing(before, after, TWO_NODES)
    assert said == "ranks 2-3 (b) are gone, they were in step 5"
    said = explain_hang(before, after, TWO_NODES)
    assert said == "ranks 2-3 (b) do not answer, they were in step 5"


def test_if_all_ranks_answer_the_network_is_named() -> None:
    said = explain_missing([WAITS, WAITS], [STILL, STILL], HOSTS)
    assert "network" in said
