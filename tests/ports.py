"""Ports that no two tests are given, whatever runs beside them."""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

# Below those that Linux gives to outgoing connections and to `bind` to port 0.
_PORTS = range(12_000, 32_000)
_held: list[int] = []  # file descriptors; their locks end with this process


def free_port(*, least: int = _PORTS.start) -> int:
    """A TCP port of this machine that is nobody's now, and no other test's while this process runs.

    It is `least` or above. Another copy of the suite asks the same lock files.
    """
    folder = Path(tempfile.gettempdir()) / f"dinoscale-test-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    while True:
        port = random.choice(range(least, _PORTS.stop))
        lock = os.open(folder / str(port), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            os.close(lock)
            continue
        _held.append(lock)
        return port
