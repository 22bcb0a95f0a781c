"""`dinoscale ...` and `python -m dinoscale ...`: errors become sentences and exit codes."""

import atexit
import os
import sys
import threading
import traceback

from dinoscale import cli, logs
from dinoscale.errors import DinoscaleError, LaunchError, PreemptedError
from dinoscale.launcher import read_process

_LEAVE_S = 5.0


def main() -> None:
    """Run the command line and exit.

    0: done; 1: the run failed; 2: bad input; 75: asked to stop, saved, goes on with the same
    command; 130: interrupted by Ctrl-C.
    """
    logs.to_terminal(_rank())
    try:
        cli.run(sys.argv[1:])
        sys.stdout.flush()
    except PreemptedError as error:
        _end(str(error), error.exit_code)
    except DinoscaleError as error:
        _end(f"error: {error}", error.exit_code)
    except BrokenPipeError:  # `dinoscale presets | head`
        os._exit(0)
    except KeyboardInterrupt:
        _end("interrupted; started again, it goes on from what is saved", 130)
    except Exception:
        _end(traceback.format_exc() + "error: dinoscale failed; this is a bug", 1)
    leave(0)


def _rank() -> int:
    """Of this process; 0 if the launcher is unclear, which is for those to tell who meet others."""
    try:
        return read_process(os.environ).rank
    except LaunchError:
        return 0


def _end(text: str, code: int) -> None:
    """Say why and leave."""
    logs.note(text)
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    leave(code)


def leave(code: int) -> None:
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
