"""Check that all ranks have the same configuration."""

from collections.abc import Sequence

from dinoscale.cluster.doctor.report import Check, ok, problem
from dinoscale.runtime.hosts import ranks_text


def judge_configs(texts: Sequence[str], hosts: list[str]) -> Check:
    """Name the ranks whose resolved configuration is not rank 0's, and the first differing line."""
    other = [rank for rank, text in enumerate(texts) if text != texts[0]]
    if not other:
        return ok("config", "the same on all ranks")
    lines = zip(texts[0].splitlines(), texts[other[0]].splitlines(), strict=False)
    first, theirs = next(((a, b) for a, b in lines if a != b), ("more", "less"))
    return problem(
        "config",
        f"rank 0 ({hosts[0]}) has `{first.strip()}`, {ranks_text(other, hosts)}"
        f" `{theirs.strip()}`; start all ranks with the same command and file",
    )
