"""Run a function of a test on several ranks, each its own process, and collect the results."""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dinoscale.distributed import free_port

_ROOT = Path(__file__).resolve().parent.parent


class RankFailedError(AssertionError):
    """A rank ended with an error, did not end, or was killed."""


def run_distributed(
    function: str, *, world_size: int, timeout_s: float, **kwargs: Any
) -> list[Any]:
    """Call `module:function(**kwargs)` on every rank; results in rank order.

    The function runs inside a started process group. Results travel by file, arguments too; both
    are plain data and tensors. The first rank to fail is named, with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(kwargs, Path(folder) / "arguments.pt")
        port = str(free_port())
        ranks = [_start(function, folder, rank, world_size, port) for rank in range(world_size)]
        try:
            _wait(ranks, Path(folder), timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [
            torch.load(Path(folder) / f"result_{rank}.pt", weights_only=True)
            for rank in range(world_size)
        ]


def _start(
    function: str, folder: str, rank: int, world_size: int, port: str
) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": str(_ROOT),
    }
    with (Path(folder) / f"output_{rank}.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.harness", function, folder],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while any(process.poll() is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)]
        if failed:
            break
        if time.monotonic() > end:
            running = [rank for rank, process in enumerate(ranks) if process.poll() is None]
            raise RankFailedError(
                f"ranks {running} did not end in {timeout_s} s\n{_tail(folder, 0)}"
            )
        time.sleep(0.05)
    for rank, process in enumerate(ranks):
        if process.poll() not in (None, 0):
            raise RankFailedError(f"rank {rank}: exit {process.returncode}\n{_tail(folder, rank)}")


def _tail(folder: Path, rank: int) -> str:
    return (folder / f"output_{rank}.txt").read_text()[-6000:]


def _main() -> None:
    function, folder = sys.argv[1], Path(sys.argv[2])
    from dinoscale import distributed
    from dinoscale.__main__ import leave
    from dinoscale.launcher import read_process

    process = read_process(os.environ)
    distributed.start(process)
    kwargs = torch.load(folder / "arguments.pt", weights_only=True)
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(**kwargs)
    torch.save(result, folder / f"result_{process.rank}.pt")
    distributed.stop()
    leave(0)


if __name__ == "__main__":
    _main()
