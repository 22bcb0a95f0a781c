"""How ranks meet, how fast they communicate, and whether their clocks agree."""

import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dinoscale.cluster.doctor.report import Check, count_text, ok, size_text, warning
from dinoscale.errors import LaunchError
from dinoscale.runtime import distributed
from dinoscale.runtime.hosts import ranks_text
from dinoscale.runtime.launcher_env import LOOPBACK, Process, rendezvous_address

SMALL_BYTES, LARGE_BYTES = 1024, 8 * 10**6  # all-reduces that measure latency and bandwidth
_SMALL_TIMES, _LARGE_TIMES = 20, 5
_SLOW_LATENCY_S = 0.01  # Ethernet has 0.0001
_SLOW_BYTES_PER_S = 1e8  # about one Gbit/s
# Longest reduction of a step's gradients without a warning: half of the step's compute, or half a
# second if that is unknown; 0.05 s is always acceptable.
_SHARE, _LONG_S, _SHORT_S = 0.5, 0.5, 0.05
_CLOCK_TOLERANCE_S = 1.0  # beyond it, logs and file times of the nodes cannot be compared


@dataclass(frozen=True)
class Network:
    """Measurements of one rank.

    Attributes:
        latency_s: median seconds of an all-reduce of SMALL_BYTES.
        large_s: median seconds of an all-reduce of LARGE_BYTES.
        clock_s: time.time() of this node right after a barrier, several times.
    """

    latency_s: float
    large_s: float
    clock_s: list[float]


def require_address(process: Process, environ: Mapping[str, str]) -> str:
    """Check the address where the ranks meet, before any rank waits for it.

    Returns:
        The finding, as a sentence.

    Raises:
        LaunchError: the address is unknown, the port is invalid, or loopback does not work.
    """
    if process.world_size == 1 and "MASTER_PORT" not in environ:
        return _require_loopback()
    address, port = rendezvous_address(process, environ)
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"MASTER_ADDR={address!r} cannot be resolved on {socket.gethostname()} ({error});"
            " export the host name or address of rank 0's node"
        ) from None
    return f"{address}:{port} is {found[0][4][0]}"


def _require_loopback() -> str:
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection((LOOPBACK, port), timeout=5):
                return f"a free port can be used on {LOOPBACK}"
    except OSError as error:
        raise LaunchError(
            f"cannot connect to {LOOPBACK} on this machine ({error.strerror or error});"
            " bring up the loopback interface"
        ) from None


def measure(device: torch.device) -> Network:
    """Time all-reduces and read the clock; all ranks call it together."""
    small = _median_s(SMALL_BYTES, _SMALL_TIMES, device)
    large = _median_s(LARGE_BYTES, _LARGE_TIMES, device)
    clock = []
    barrier = torch.zeros(1, device=device)
    for _ in range(5):
        distributed.all_reduce_sum(barrier).item()
        clock.append(time.time())
    return Network(small, large, clock)


def _median_s(num_bytes: int, times: int, device: torch.device) -> float:
    tensor = torch.zeros(num_bytes // 4, device=device)
    seconds = []
    for _ in range(times + 2):  # the first ones open connections
        begin = time.perf_counter()
        distributed.all_reduce_sum(tensor)[0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def judge_network(
    of_ranks: Sequence[Network],
    hosts: list[str],
    *,
    world_size: int,
    gradient_bytes: int | None,
    compute_s: float | None = None,
) -> list[Check]:
    """Judge the all-reduce of the slowest rank by the needs of a step, and the clocks.

    Args:
        of_ranks: measured together.
        hosts: of the ranks.
        world_size: ranks that should have met.
        gradient_bytes: that a step reduces over ranks; None without a configuration.
        compute_s: seconds of compute in a step, None if unknown.
    """
    if len(of_ranks) == 1:
        alone = world_size == 1
        return [ok("network", "one process, nothing to measure" if alone else "not measured")]
    latency_s = max(network.latency_s for network in of_ranks)
    speed = LARGE_BYTES / max(network.large_s for network in of_ranks)
    said = (
        f"all-reduce over {len(of_ranks)} ranks on {count_text(len(set(hosts)), 'node')}:"
        f" {1e3 * latency_s:.3g} ms for {size_text(SMALL_BYTES)},"
        f" {size_text(speed)}/s for {size_text(LARGE_BYTES)}"
    )
    slow = latency_s > _SLOW_LATENCY_S or speed < _SLOW_BYTES_PER_S
    if gradient_bytes:
        waits_s = gradient_bytes / speed
        said += f"; the gradients of a step take about {waits_s:.2g} s"
        if compute_s is not None:
            said += f", its compute about {compute_s:.2g} s"
        slow |= waits_s > max(_SHORT_S, _LONG_S if compute_s is None else _SHARE * compute_s)
    if slow:
        said += "; choose a faster interface with NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
    verdict = warning if slow else ok
    clocks = [network.clock_s for network in of_ranks]
    return [verdict("network", said), judge_clocks(clocks, hosts)]


def judge_clocks(clocks: Sequence[Sequence[float]], hosts: list[str]) -> Check:
    """Name the ranks whose clock differs from rank 0's.

    Args:
        clocks: time.time() of each rank after one or several barriers.
        hosts: of the ranks.
    """
    offsets = [  # from rank 0, at the barrier with the smallest difference
        min((own - first for own, first in zip(clock, clocks[0], strict=True)), key=abs)
        for clock in clocks
    ]
    apart = [rank for rank, offset in enumerate(offsets) if abs(offset) > _CLOCK_TOLERANCE_S]
    worst = max(offsets, key=abs)
    if apart:
        return warning(
            "clocks",
            f"{ranks_text(apart, hosts)} up to {abs(worst):.1f} s"
            f" {'ahead of' if worst > 0 else 'behind'} rank 0; run a time service such as chrony",
        )
    return ok("clocks", f"within {abs(worst):.2g} s of rank 0's")
