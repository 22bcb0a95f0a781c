"""Commands that run alike on one process and on all ranks of a launcher."""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from dinoscale.errors import LaunchError
from dinoscale.runtime.launcher_env import Process, read_process

T = TypeVar("T")


def prepared(prepare: Callable[[], T]) -> T:
    """What each rank makes for itself before it meets the others, as its configuration.

    Raises:
        Exception: it cannot; the others, which wait for this rank, end too, and say why.
    """
    try:
        return prepare()
    except Exception as error:
        tell_others(error)
        raise


def tell_others(error: Exception) -> None:
    """Let the other ranks, if there are any, hear why this one ends before it has met them."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a rank 0 that never comes
    with contextlib.suppress(Exception):  # what matters is the error at hand
        process = read_process(os.environ)
        if process.world_size > 1:
            from dinoscale.runtime import distributed

            distributed.start(process, startup_error=error)


def require_one_process(command: str, remedy: str = "") -> None:
    """Refuse to do everything once a rank, before anything is read or written; rank 0 says so.

    Args:
        command: words after `dinoscale`.
        remedy: what to do instead; by default, to start it without a launcher.

    Raises:
        LaunchError: a launcher has started several processes, of which this is the first.
        SystemExit: with 2, it is another one.
    """
    process = read_process(os.environ)
    if process.world_size == 1:
        return
    if process.rank:
        raise SystemExit(LaunchError.exit_code)
    raise LaunchError(
        f"{command} runs in one process, not in {process.world_size}."
        f" {remedy or f'Start it as `dinoscale {command} ...`.'}"
    )


def on_all_ranks(evaluate: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Meet the other ranks, if there are any, and do what shares its work with them.

    Args:
        evaluate: the work; every rank calls it and gets the same report.

    Returns:
        The report on rank 0, None on the others: it is printed once.

    Raises:
        LaunchError: the ranks cannot meet.
    """
    # Else a lost rank is reported by screens of C++ frames, around the one line that says which.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    process = read_process(os.environ)
    if process.world_size == 1:
        return evaluate()
    with joined(process):
        report = evaluate()
    return report if process.rank == 0 else None


@contextlib.contextmanager
def joined(process: Process) -> Iterator[None]:
    """Meet the other ranks and leave together; why one fails inside reaches all within seconds.

    Raises:
        LaunchError: the ranks cannot meet.
        RunFailedError: another rank failed or is gone.
    """
    from dinoscale.runtime import distributed
    from dinoscale.runtime.watchdog import Watchdog

    distributed.start(process)
    hosts = distributed.gather_objects(socket.gethostname())
    watchdog = Watchdog(
        timeout_s=math.inf,  # only training says that it moves
        hosts=hosts,
        launched=False,
        ask_to_stop=lambda _: None,
    )
    with watchdog.sharing_failure():
        yield
    distributed.stop()
