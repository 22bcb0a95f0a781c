"""Memory that this machine, or the container around us, can still give, and its lack."""

import re
from pathlib import Path

# What torch, CUDA, NCCL, oneDNN, C++ and the C library say when they are given no more memory.
NO_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|MemoryError|DefaultCPUAllocator|bad_alloc|ALLOC_FAILED"
    r"|Can(not|'t) allocate memory|could not create a (primitive|memory object)$",
    re.IGNORECASE | re.MULTILINE,
)
_MEMORY_FILES = {  # version of the control groups -> where they are mounted, limit, usage
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def memory_at_hand(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes within all limits, swap apart; None where the system does not say.

    Args:
        proc: where the kernel tells about processes.
        cgroups: where it tells about the limits of groups of them.
    """
    try:
        free_kib = _number_after("MemAvailable:", proc / "meminfo")
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return None
    rooms = [1024 * free_kib]
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers in _MEMORY_FILES:
            mount, limit, usage = _MEMORY_FILES[controllers]
            group = cgroups / mount / path.lstrip("/")
            while group.is_relative_to(cgroups / mount):
                rooms += _room(group, limit, usage)
                group = group.parent
    return max(0, min(rooms))


def _room(group: Path, limit: str, usage: str) -> list[int]:
    """What a group may still take, files that it only keeps in mind included; empty: no limit."""
    try:
        allowed = int((group / limit).read_text())
        cached = _number_after("inactive_file", group / "memory.stat")
        return [allowed - int((group / usage).read_text()) + cached]
    except (OSError, ValueError):  # "max", or a group that we do not see from inside
        return []


def _number_after(name: str, path: Path) -> int:
    words = path.read_text().split()
    return int(words[words.index(name) + 1])
