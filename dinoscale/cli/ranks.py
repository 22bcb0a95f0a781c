"""Commands that run in one process or, under a launcher, on all its ranks."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from dinoscale.errors import LaunchError
from dinoscale.runtime.launcher_env import Process, read_process

if TYPE_CHECKING:
    from dinoscale.config import RunConfig

T = TypeVar("T")


def load_and_import(
    options: argparse.Namespace, import_work: Callable[[], T]
) -> tuple[RunConfig, T]:
    """Load the configuration and import its work, before this rank meets the others.

    Args:
        options: their `config` and `overrides` name the configuration.
        import_work: imports and returns the function that does the work.

    Raises:
        Exception: one of them failed, perhaps on this node alone, where a library is missing. The
            other ranks, which wait for this one, then end too and report the reason.
    """
    try:
        from dinoscale.config import load_config

        return load_config(options.config, options.overrides), import_work()
    except Exception as error:
        tell_others(error)
        raise


def tell_others(error: Exception) -> None:
    """Tell the other ranks, if there are any, why this one ends before it has met them."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides frames if rank 0 never comes
    with contextlib.suppress(Exception):  # the caller raises the error that matters
        process = read_process(os.environ)
        if process.world_size > 1:
            from dinoscale.runtime import distributed

            distributed.start(process, startup_error=error)


def require_one_process(command: str, remedy: str = "", *, reason: str = "") -> None:
    """Refuse several processes, each of which would do all the work; rank 0 reports it.

    Call it before anything is read or written.

    Args:
        command: words after `dinoscale`.
        remedy: what to do instead; by default, to start it without a launcher.
        reason: why it is refused, in words.

    Raises:
        LaunchError: a launcher has started several processes, and this is rank 0.
        SystemExit: with 2, on the other ranks.
    """
    process = read_process(os.environ)
    if process.world_size == 1:
        return
    if process.rank:
        raise SystemExit(LaunchError.exit_code)
    raise LaunchError(
        f"{command} runs in one process, not in {process.world_size}{reason and f': {reason}'}."
        f" {remedy or f'Start it as `dinoscale {command} ...`.'}"
    )


def on_all_ranks(evaluate: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Meet the other ranks, if there are any, and evaluate together with them.

    Args:
        evaluate: every rank calls it and gets the same report.

    Returns:
        The report on rank 0, None on the others, so that it is printed once.

    Raises:
        LaunchError: the ranks cannot meet.
    """
    # Else screens of C++ frames surround the one line that names a lost rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    process = read_process(os.environ)
    if process.world_size == 1:
        return evaluate()
    with joined_ranks(process):
        report = evaluate()
    return report if process.rank == 0 else None


@contextlib.contextmanager
def joined_ranks(process: Process) -> Iterator[None]:
    """Meet the other ranks and end together; a failure of one reaches all within seconds.

    Raises:
        LaunchError: the ranks cannot meet.
        RunFailedError: another rank failed or is gone.
    """
    from dinoscale.runtime import distributed
    from dinoscale.runtime.watchdog import Watchdog

    distributed.start(process)
    hosts = distributed.gather_objects(socket.gethostname())
    watchdog = Watchdog(
        timeout_s=math.inf,  # only training reports progress
        hosts=hosts,
        launched=False,
        ask_to_stop=lambda _: None,
    )
    with watchdog.sharing_failure():
        yield
    distributed.stop()
