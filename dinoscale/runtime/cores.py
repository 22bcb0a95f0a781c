"""CPU cores that this process may use."""

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "max 100000" or microseconds per period


def cpu_affinity() -> frozenset[int]:
    """Numbers of the cores on which the scheduler may run this process."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def core_quota() -> float | None:
    """Number of cores that the container allows, None without a limit."""
    return parse_quota(_QUOTA.read_text() if _QUOTA.is_file() else "max")


def parse_quota(text: str) -> float | None:
    """Cores from the two numbers of cgroup v2's cpu.max."""
    words = text.split()
    return None if len(words) != 2 or words[0] == "max" else int(words[0]) / int(words[1])


def cores_per_rank(local_world_size: int) -> int:
    """Whole cores for each of the ranks that share this node, at least 1."""
    return max(1, available_cores() // local_world_size)


def available_cores() -> int:
    """Whole cores within affinity and quota, at least 1."""
    cores, quota = len(cpu_affinity()), core_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))
