"""`dinoscale ...` and `python -m dinoscale ...`: errors become sentences and exit codes."""

import atexit
import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from dinoscale import cli
from dinoscale.errors import DinoscaleError, LaunchError, PreemptedError
from dinoscale.runtime import logs
from dinoscale.runtime.launcher_env import read_process

log = logging.getLogger(__name__)

_LEAVE_S = 5.0


def main() -> None:
    """Run the command line and exit.

    0: done; 1: the run failed; 2: bad input; 69: storage or network failed for minutes; 75: asked
    to stop, saved, goes on with the same command; 130: interrupted by Ctrl-C. Whether a terminal
    takes what is printed changes none of them, except that a result that is nowhere else and cannot
    be written is a failure.
    """
    _look_here_last()
    logs.shield_terminal()
    logs.to_terminal(_rank())
    try:
        kept = cli.run(sys.argv[1:])
    except SystemExit as error:  # of argparse
        sys.stdout.flush()
        leave(error.code if isinstance(error.code, int) else int(error.code is not None))
    except PreemptedError as error:
        _end(str(error), error.exit_code)
    except DinoscaleError as error:
        _end(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        _end("interrupted; what was not saved until now is lost", 130)
    except Exception:
        _end(traceback.format_exc() + "error: dinoscale failed; this is a bug", 1)
    lost = logs.stdout_error()
    if lost is not None:
        why = getattr(lost, "strerror", None) or lost
        text = f"what was printed is incomplete: stdout: {why}"
        if not kept:
            _end(f"error: {text}", 1)
        log.warning("%s", text)
    leave(0)


def _look_here_last() -> None:
    """Import nothing from the working directory that is found elsewhere.

    `python -m` and DeepSpeed put it first, where a folder `data_tools`, `tests` or `wandb` of the
    user would be taken for a package.
    """
    with suppress(FileNotFoundError):  # it has been deleted
        here = os.getcwd()
        if here != str(Path(__file__).resolve().parents[1]):
            sys.path.sort(key=lambda path: os.path.abspath(path) == here)


def _rank() -> int:
    """Of this process; 0 if the launcher is unclear, which is for those to tell who meet others."""
    try:
        return read_process(os.environ).rank
    except LaunchError:
        return 0


def _end(text: str, code: int) -> NoReturn:
    """Say why, without the passwords of URLs and commands that were typed, and leave."""
    from dinoscale.config.secrets import hide_secrets  # brings libraries, see _look_here_last

    logs.log_exit(str(hide_secrets(text)))
    sys.stdout.flush()
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process: what was left for its exit is done, the interpreter is not taken apart.

    Threads of the backends may abort a process that does the latter, after all is saved, or wait
    for other ranks.
    """
    last = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    last.start()
    last.join(_LEAVE_S)
    os._exit(code)


if __name__ == "__main__":
    main()
