"""What a process that works for another does about signals, and about the end of that one."""

import multiprocessing
import os
import signal
import threading


def leave_signals_to_parent() -> None:
    """Ignore what asks a job to stop: the process that started this one ends it itself.

    Launchers and terminals signal whole process trees.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """From now on, end at once when the process that started this one is gone."""
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
