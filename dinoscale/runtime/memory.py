"""Memory of this machine or its container and of this process, and errors where there is none."""

import re
import resource
import sys
from pathlib import Path

# Out-of-memory errors of torch, CUDA, NCCL, oneDNN, C++ and the C library.
NO_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|MemoryError|DefaultCPUAllocator|bad_alloc|ALLOC_FAILED"
    r"|Can(not|'t) allocate memory|could not create a (primitive|memory object)$",
    re.IGNORECASE | re.MULTILINE,
)
_MEMORY_FILES = {  # version of the control groups -> where they are mounted, limit, usage
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def available_memory(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes available within all limits, without swap; None if the system does not say.

    Args:
        proc: mount point of procfs.
        cgroups: mount point of the control groups.
    """
    try:
        free_kib = _number_after("MemAvailable:", proc / "meminfo")
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return None
    available = [1024 * free_kib]
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers in _MEMORY_FILES:
            mount, limit, usage = _MEMORY_FILES[controllers]
            group = cgroups / mount / path.lstrip("/")
            while group.is_relative_to(cgroups / mount):
                available += _within_limit(group, limit, usage)
                group = group.parent
    return max(0, min(available))


def peak_resident_bytes(proc: Path = Path("/proc")) -> int:
    """The most memory, in bytes, that this process has had in RAM.

    Where there is no procfs, that of the process that started it counts too: it began as its copy.

    Args:
        proc: mount point of procfs.
    """
    try:
        return 1024 * _number_after("VmHWM:", proc / "self" / "status")
    except (OSError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def private_bytes() -> int:
    """Private writable memory of this process, which counts against RLIMIT_DATA; needs procfs."""
    return 1024 * _number_after("VmData:", Path("/proc/self/status"))


def _within_limit(group: Path, limit: str, usage: str) -> list[int]:
    """Bytes that a group may still take, inactive page cache included; empty without a limit."""
    try:
        allowed = int((group / limit).read_text())
        cached = _number_after("inactive_file", group / "memory.stat")
        return [allowed - int((group / usage).read_text()) + cached]
    except (OSError, ValueError):  # "max", or a group that is not visible from inside
        return []


def _number_after(name: str, path: Path) -> int:
    words = path.read_text().split()
    return int(words[words.index(name) + 1])
