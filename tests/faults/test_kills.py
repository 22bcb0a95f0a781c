"""A run that is killed repeatedly ends like an undisturbed one, bit for bit."""

from pathlib import Path

import pytest

from tests.faults.kills import moments, run_kills

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 5  # at each of three stages: 15 in a session; `python -m tests.faults` does any number


@pytest.mark.parametrize(
    ("stage", "objective", "launchers"),
    [(0, "dino", True), (2, "sinkhorn_knopp", True), (3, "centering", False)],
)
def test_killed_run_ends_as_the_undisturbed_one(
    tmp_path: Path, stage: int, objective: str, *, launchers: bool
) -> None:
    tally = run_kills(
        tmp_path, kills=KILLS, stage=stage, seed=stage, objective=objective, launchers=launchers
    )
    assert (tally.kills, tally.resumed, tally.bit_identical) == (KILLS, KILLS, KILLS)
    assert tally.in_save > 0
    assert tally.lost_steps > 0


def test_kills_are_the_same_for_a_seed_and_hit_everything() -> None:
    found = moments(24, seed=0)
    assert found == moments(24, seed=0) != moments(24, seed=1)
    targets = {moment.target for moment in found}
    assert targets >= {"rank 0", "rank 1", "all"}
    assert targets & {"torchrun", "deepspeed"}
    assert {moment.workers for moment in found} == {0, 1}
