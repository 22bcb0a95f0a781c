"""Signals in a worker process, and its exit when its parent is gone."""

import multiprocessing
import os
import signal
import threading


def leave_signals_to_parent() -> None:
    """Ignore the signals that stop a job: the parent ends its workers itself.

    Launchers and terminals signal whole process trees.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """From now on, exit as soon as the parent process is gone."""
    threading.Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
