"""`dinoscale ...` and `python -m dinoscale ...`: errors become sentences and exit codes."""

import logging
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from dinoscale import cli
from dinoscale.cli.restart import run_exit_handlers
from dinoscale.errors import DinoscaleError, LaunchError, PreemptedError
from dinoscale.runtime import logs
from dinoscale.runtime.launcher_env import read_process

log = logging.getLogger(__name__)


def main() -> None:
    """Run the command line and exit.

    0: done; 1: the run failed; 2: bad input; 69: storage or network failed for minutes; 75: asked
    to stop and saved, and the same command continues; 130: interrupted by Ctrl-C. Output that
    cannot be printed changes the code only if it is the only copy of the result: then it is 1.
    """
    _search_working_directory_last()
    logs.shield_terminal()
    logs.to_terminal(_rank())
    try:
        result_on_disk = cli.run(sys.argv[1:])
    except SystemExit as error:  # of argparse
        sys.stdout.flush()
        leave(error.code if isinstance(error.code, int) else int(error.code is not None))
    except PreemptedError as error:
        _exit_with(str(error), error.exit_code)
    except DinoscaleError as error:
        _exit_with(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        _exit_with("interrupted; unsaved work is lost", 130)
    except Exception:
        _exit_with(traceback.format_exc() + "error: dinoscale failed; this is a bug", 1)
    lost = logs.stdout_error()
    if lost is not None:
        why = getattr(lost, "strerror", None) or lost
        text = f"the printed output is incomplete: stdout: {why}"
        if not result_on_disk:
            _exit_with(f"error: {text}", 1)
        log.warning("%s", text)
    leave(0)


def _search_working_directory_last() -> None:
    """Move the working directory to the end of the import path.

    `python -m` and DeepSpeed put it first, where a folder of the user named `data_tools`, `tests`
    or `wandb` would be taken for a package.
    """
    with suppress(FileNotFoundError):  # it has been deleted
        here = os.getcwd()
        if here != str(Path(__file__).resolve().parents[1]):
            sys.path.sort(key=lambda path: os.path.abspath(path) == here)


def _rank() -> int:
    """Rank of this process; 0 if unclear: commands that meet other ranks report that error."""
    try:
        return read_process(os.environ).rank
    except LaunchError:
        return 0


def _exit_with(text: str, code: int) -> NoReturn:
    """Print the reason, with passwords in URLs and commands hidden, and exit."""
    # Imports libraries, so only after _search_working_directory_last.
    from dinoscale.config.secrets import hide_secrets

    logs.log_exit(str(hide_secrets(text)))
    sys.stdout.flush()
    leave(code)


def leave(code: int) -> NoReturn:
    """Run the exit handlers, then end this process without tearing down the interpreter.

    The teardown could make threads of the backends abort the process after everything is saved, or
    wait for other ranks.
    """
    run_exit_handlers()
    os._exit(code)


if __name__ == "__main__":
    main()
