"""Go on in this process with a new interpreter."""

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dinoscale.runtime.preemption import SIGNALS, handed_on

_EXIT_HANDLERS_S = 5.0


def restart(arguments: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """Replace this process by a new interpreter of dinoscale; its launcher sees no difference.

    All memory is free then, also that of libraries which keep theirs until the end of a process. A
    request to stop that comes meanwhile reaches the new `StopRequest`.

    Args:
        arguments: of the command line.
        environ: variables of the new interpreter.
    """
    run_exit_handlers()
    sys.stdout.flush()
    sys.stderr.flush()
    # Else the signals of schedulers would end a process without handlers; now they wait for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execve(sys.executable, _command(arguments), {**environ, **handed_on()})


def run_exit_handlers() -> None:
    """Run what an end of the process would run: data workers, logs, wandb; for some seconds.

    One that waits for other ranks or for a network is left behind.
    """
    handlers = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    handlers.start()
    handlers.join(_EXIT_HANDLERS_S)


def _command(arguments: Sequence[str]) -> list[str]:
    """The command as it was typed, with other arguments.

    `-m` would search the working directory for dinoscale, where it was not typed.
    """
    given, typed = sys.argv[1:], sys.orig_argv
    program = typed[: len(typed) - len(given)]
    if [*program, *given] == typed:
        return [sys.executable, *program[1:], *arguments]
    python: Any = subprocess
    flags = python._args_from_interpreter_flags()  # such as -X dev
    return [sys.executable, *flags, "-m", "dinoscale", *arguments]
