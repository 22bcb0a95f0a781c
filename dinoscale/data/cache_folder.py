"""The cache folder: files that are slow to make, kept between runs."""

import fcntl
import glob
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

log = logging.getLogger(__name__)

_POLL_S = 0.2  # between two tries for a lock that another process holds
_ABANDONED_S = 3600  # without a write, after which a partial file counts as abandoned


def cached_file(kind: str, keys: Iterable[str]) -> str:
    """Path for a cached file, in a folder that exists.

    The folder is DINOSCALE_CACHE, else XDG_CACHE_HOME/dinoscale, else ~/.cache/dinoscale.

    Args:
        kind: what the file holds; the prefix of its name.
        keys: what the file was made from; other keys give another file.

    Raises:
        OSError: the folder cannot be made.
    """
    own = os.environ.get("DINOSCALE_CACHE", "")
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(shared):  # the XDG specification ignores a relative path
        shared = os.path.expanduser("~/.cache")
    folder = os.path.abspath(own) if own else os.path.join(shared, "dinoscale")
    if not os.path.isabs(folder):
        raise OSError("this user has no home folder")
    os.makedirs(folder, exist_ok=True)
    digest = hashlib.blake2b(digest_size=16)
    for key in keys:
        digest.update(os.fsencode(key) + b"\0")
    return os.path.join(folder, f"{kind}-{digest.hexdigest()}")


@contextmanager
def locked(path: str, heartbeat: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file: one process works on it, the others wait.

    On a file system without locks nobody waits, and the file may be made twice, which is harmless
    for one that is put in place whole. The kernel frees the lock of a process that dies.

    Args:
        path: the file.
        heartbeat: called repeatedly while this process waits.
    """
    descriptor = -1
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _lock(descriptor, path, heartbeat)
    except OSError as error:
        log.debug("no lock on %s: %s", path, error)
    try:
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def remove_abandoned(path: str) -> None:
    """Remove the partial files of processes that were killed while they wrote this file."""
    for partial in glob.glob(f"{glob.escape(path)}.*.partial"):
        _remove_if_abandoned(partial)


def _remove_if_abandoned(partial: str) -> None:
    with suppress(FileNotFoundError):  # it was finished meanwhile, or another process removed it
        if os.stat(partial).st_mtime < time.time() - _ABANDONED_S:
            os.unlink(partial)


def keep_recent(path: str, *, most_bytes: float) -> None:
    """Make room for a file: remove the least recently written or touched files of its kind.

    Partial files that killed processes left of any file of this kind are removed, too.

    Args:
        path: the file, from `cached_file`, with an extension.
        most_bytes: the most that the other files of its kind and extension may take together.
    """
    folder, name = os.path.split(path)
    kind, extension = name.partition("-")[0], os.path.splitext(name)[1]
    pattern = os.path.join(glob.escape(folder), f"{kind}-*{extension}")
    for partial in glob.glob(f"{pattern}.*.partial"):
        _remove_if_abandoned(partial)
    found = []
    for file in glob.glob(pattern):
        with suppress(FileNotFoundError):  # another process makes room as well
            state = os.stat(file)
            found.append((state.st_mtime_ns, state.st_size, file))
    left = most_bytes
    for _, size, file in sorted(found, reverse=True):
        left -= size if file != path else 0
        if left < 0:
            log.info("removing %s, the least recently used", file)
            with suppress(FileNotFoundError):
                os.unlink(file)


def _lock(descriptor: int, path: str, heartbeat: Callable[[], None]) -> None:
    if _is_locked_now(descriptor):
        return
    log.info("another process is making %s: waiting for it", path)
    while not _is_locked_now(descriptor):
        heartbeat()
        time.sleep(_POLL_S)


def _is_locked_now(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
