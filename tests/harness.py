"""Run a function of a test on several ranks, each its own process, and collect the results."""

import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.forked import ROOT, Forked
from tests.ports import free_port


class RankFailedError(AssertionError):
    """A rank ended with an error, did not end, or was killed."""


def run_distributed(
    function: str, *, world_size: int, timeout_s: float, **kwargs: Any
) -> list[Any]:
    """Call `module:function(**kwargs)` on every rank; results in rank order.

    The function runs inside a started process group. Results travel by file, arguments too; both
    are plain data and tensors. The first rank to fail is named, with the end of its output.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(kwargs, folder / "arguments.pt")
        port = free_port()
        ranks = [
            Forked(
                _call,
                function,
                folder,
                environment=environment_of(rank, world_size=world_size, port=port),
                output=folder / f"output_{rank}.txt",
            )
            for rank in range(world_size)
        ]
        try:
            _wait(ranks, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [
            torch.load(folder / f"result_{rank}.pt", weights_only=True)
            for rank in range(world_size)
        ]


def environment_of(rank: int, *, world_size: int, port: int) -> dict[str, str]:
    """What a launcher on one node says to a rank, beside the variables of this process."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    own |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {
        **os.environ,
        **{name: str(value) for name, value in own.items()},
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": str(ROOT),
    }


def _wait(ranks: list[Forked], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while any(process.poll() is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)]
        if failed:
            break
        if time.monotonic() > end:
            running = [rank for rank, process in enumerate(ranks) if process.poll() is None]
            raise RankFailedError(
                f"ranks {running} did not end in {timeout_s} s\n{_end_of(ranks[running[0]])}"
            )
        time.sleep(0.02)
    for rank, process in enumerate(ranks):
        if process.poll() not in (None, 0):
            raise RankFailedError(f"rank {rank}: exit {process.returncode}\n{_end_of(process)}")


def _end_of(process: Forked) -> str:
    return process.said()[-6000:]


def _call(function: str, folder: Path) -> None:
    from dinoscale.__main__ import leave
    from dinoscale.runtime import distributed
    from dinoscale.runtime.launcher_env import read_process

    process = read_process(os.environ)
    distributed.start(process)
    kwargs = torch.load(folder / "arguments.pt", weights_only=True)
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(**kwargs)
    torch.save(result, folder / f"result_{process.rank}.pt")
    distributed.stop()
    leave(0)


if __name__ == "__main__":  # under a real launcher: `-m tests.harness FUNCTION FOLDER`
    _call(sys.argv[1], Path(sys.argv[2]))
