"""Whether the devices wait for data, and what to change then."""

ALLOWED = 0.1  # share of the time without data, above which something should be done


class DataWait:
    """Warns once in a run; the first interval after a start is not counted, workers fill it.

    A rank on a CPU that loads its own images does not wait for them but works on them: it is never
    warned of.
    """

    def __init__(self, *, num_workers: int, cores: int, ranks_here: int, on_cpu: bool) -> None:
        """Of one node: data workers per rank, cores at hand, ranks that share them."""
        self._num_workers, self._cores, self._ranks_here = num_workers, cores, ranks_here
        self._works_itself = on_cpu and num_workers == 0
        self._starting, self._warned = True, False

    def restarted(self) -> None:
        """The workers begin anew: the next interval is not counted."""
        self._starting = True

    def observe(self, share: float) -> str | None:
        """What to warn of after an interval between log lines, or None.

        Args:
            share: of the time in which the rank that waited longest had no batch.
        """
        starting, self._starting = self._starting, False
        if starting or self._warned or self._works_itself or share <= ALLOWED:
            return None
        self._warned = True
        most = max(1, self._cores // self._ranks_here)
        workers = (
            f"raise data.num_workers from {self._num_workers} to {most}"
            if most > self._num_workers
            else f"data.num_workers={self._num_workers} already takes all {self._cores} cores"
            " at hand, so bring more of them"
        )
        return (
            f"no data for {share:.0%} of the time: {workers}, or make the images cheaper to read"
            " (shards instead of loose files, shorter sides); `dinoscale bench data` shows what"
            " limits"
        )
