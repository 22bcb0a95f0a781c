"""When the Gram network is refreshed."""

from dinoscale.config.sections.objectives import GramConfig
from dinoscale.engine.frozen.gram import refreshes_after


def _after(**rule: int) -> list[int]:
    """Steps done at the refreshes of forty steps."""
    gram, after = GramConfig(**rule), list[int]()
    for step in range(40):
        if refreshes_after(step, gram, done=len(after)):
            after.append(step + 1)
    if after:
        assert gram.steps_without == after[0]
    return after


def test_refreshes_come_at_multiples_from_a_step_on_and_at_most_so_often() -> None:
    assert _after(refresh_every_steps=2, first_refresh_step=3, max_refreshes=2) == [4, 6]
    assert _after(refresh_every_steps=4, first_refresh_step=6, max_refreshes=2) == [8, 12]
    assert _after(refresh_every_steps=4, first_refresh_step=8, max_refreshes=1) == [8]
    assert _after(refresh_every_steps=15) == [15, 30]
    assert _after() == []
