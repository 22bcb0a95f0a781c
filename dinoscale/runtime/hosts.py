"""Names for ranks and their hosts in messages."""

from collections.abc import Iterable, Sequence

_HOSTS_NAMED = 4


def ranks_text(ranks: Iterable[int], hosts: Sequence[str]) -> str:
    """`ranks 8-15 (gpu-02), rank 16 (gpu-03)`: by host, at most four hosts by name.

    Args:
        ranks: the ranks to name.
        hosts: host name of each rank of the job.
    """
    of_host: dict[str, list[int]] = {}
    for rank in ranks:
        of_host.setdefault(hosts[rank], []).append(rank)
    named = [f"{span_text(here)} ({host})" for host, here in of_host.items()]
    more = f" and {len(named) - _HOSTS_NAMED} more hosts" if len(named) > _HOSTS_NAMED else ""
    return ", ".join(named[:_HOSTS_NAMED]) + more


def span_text(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-3` or `ranks 0-3, 5` for ascending numbers."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
