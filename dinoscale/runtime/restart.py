"""Start the running command anew in this process, with a new interpreter."""

import atexit
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NoReturn


def restart(environ: Mapping[str, str]) -> NoReturn:
    """Replace this process by the command it runs; its launcher sees no difference.

    All memory is free then, also that of libraries which keep theirs until the end of a process.

    Args:
        environ: variables of the new interpreter.
    """
    internal: Any = atexit
    internal._run_exitfuncs()  # as an end of the process would: data workers, logs, wandb
    sys.stdout.flush()
    sys.stderr.flush()
    python: Any = subprocess
    flags = python._args_from_interpreter_flags()  # such as -X dev
    os.execve(sys.executable, [sys.executable, *flags, "-m", "dinoscale", *sys.argv[1:]], environ)
