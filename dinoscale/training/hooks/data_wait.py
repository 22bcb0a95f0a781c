"""Detect devices that wait for data, and suggest what to change."""

ALLOWED = 0.1  # share of the time without data above which a warning is due


class DataWait:
    """Warns once per run; the first interval after a start, in which workers fill up, is ignored.

    A rank on a CPU without data workers decodes its own images instead of waiting for them, and is
    never warned about.
    """

    def __init__(self, *, num_workers: int, cores: int, ranks_here: int, on_cpu: bool) -> None:
        """Args describe one node: data workers per rank, available cores, ranks that share them."""
        self._num_workers, self._cores, self._ranks_here = num_workers, cores, ranks_here
        self._works_itself = on_cpu and num_workers == 0
        self._starting, self._warned = True, False

    def restarted(self) -> None:
        """Ignore the next interval, in which restarted workers fill up."""
        self._starting = True

    def observe(self, share: float) -> str | None:
        """A warning after an interval between log lines, or None.

        Args:
            share: of the interval for which the rank that waited longest had no batch.
        """
        starting, self._starting = self._starting, False
        if starting or self._warned or self._works_itself or share <= ALLOWED:
            return None
        self._warned = True
        most = max(1, self._cores // self._ranks_here)
        workers = (
            f"raise data.num_workers from {self._num_workers} to {most}"
            if most > self._num_workers
            else f"data.num_workers={self._num_workers} already uses all {self._cores} available"
            " cores, so use a machine with more"
        )
        return (
            f"no data for {share:.0%} of the time: {workers}, or make the images cheaper to read"
            " (shards instead of loose files, shorter sides); `dinoscale bench data` shows what"
            " limits"
        )
