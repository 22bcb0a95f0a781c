"""Processes: how they meet, and the few collectives that dinoscale needs.

The only module that imports torch.distributed. Every collective is the identity on one process.
"""

import contextlib
import logging
import math
import os
import re
import resource
import socket
import time
from collections.abc import Callable, MutableMapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dinoscale.errors import DinoscaleError, LaunchError, LostPeerError, RunFailedError
from dinoscale.runtime.cores import cores_of_rank
from dinoscale.runtime.float32 import exact_float32
from dinoscale.runtime.launcher_env import LOOPBACK, Process, meeting_place

log = logging.getLogger(__name__)
T = TypeVar("T")

_under_way: list[Any] = []  # collectives that were begun and not yet waited for
_client: Any = None  # of the store: one connection of this process for all of its boards

TIMEOUT_S = 1800.0  # slow nodes may take minutes to come up
MOST_FILES = 65536  # that a process may open; enough for ten thousand ranks
_STORE_TIMEOUT = timedelta(seconds=60)  # of a small message; a busy node may take its time
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0  # of a thousand ranks, 500 questions a second
_PORT = "dinoscale/port"  # of rank 0's store, in that of torchrun
_FITNESS, _FIT, _ALL_HEARD = "fitness", "fit", "all heard"
_TELL_S, _QUIET_S = 60.0, 3.0  # to tell others why this rank ends; before it says that it waits
_LOST_PEER = re.compile(r"gloo|nccl|connection|peer|timed out|socket", re.IGNORECASE)


def start(
    process: Process, *, timeout_s: float = TIMEOUT_S, unfit: Exception | None = None
) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and say so in the environment.

    Args:
        process: who this is.
        timeout_s: how long to wait for the others, now and in every collective.
        unfit: why this rank cannot take part, as a mistake in its configuration: it only tells the
            others, which would wait for it as long as that.

    Raises:
        LaunchError: the address is unknown, its port is taken on this machine, or there are not as
            many accelerators as ranks; or another rank is unfit, and the text says which and why.
        Exception: `unfit` itself.
    """
    environ = os.environ
    exact_float32()
    unfit = unfit or _lack_of_device(process)
    _allow_open_files()
    address, port = _meeting_place(process, environ)
    environ["RANK"], environ["WORLD_SIZE"] = str(process.rank), str(process.world_size)
    environ["LOCAL_RANK"] = str(process.local_rank)
    timeout = timedelta(seconds=timeout_s if unfit is None else min(timeout_s, _TELL_S))
    # DeepSpeed names no time-out for its groups, and the default of NCCL's would be 10 minutes.
    defaults: Any = dist.distributed_c10d
    defaults.default_pg_timeout = defaults.default_pg_nccl_timeout = timeout
    try:
        store = _store_of_rank_0(process, address, port, timeout=timeout, unfit=unfit)
        environ["MASTER_ADDR"], environ["MASTER_PORT"] = store.host, str(store.port)
        _require_fit(_texts_in(store), process, unfit)
        dist.init_process_group(
            "nccl" if process.device.type == "cuda" else "gloo",
            store=store,
            rank=process.rank,
            world_size=process.world_size,
            timeout=timeout,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        if unfit is not None:
            raise unfit from None
        first = str(error).splitlines()[0]
        raise LaunchError(
            f"rank {process.rank} of {process.world_size} ({socket.gethostname()}) could not meet"
            f" the others at {address}:{port}: {first}; check that all were started, that rank 0"
            " runs there and that the port is free and reachable"
        ) from error


def _store_of_rank_0(
    process: Process, address: str, port: int, *, timeout: timedelta, unfit: Exception | None
) -> Any:
    """A store that is new at each start of the ranks, so that no text of an earlier one is in it.

    torchrun keeps its own when it starts them again, and its nodes count the starts differently:
    that one only tells where the new one is.

    Raises:
        LaunchError: this is rank 0, and the port is taken.
        DistError: rank 0 is not there.
    """
    exported: Any = dist  # TCPStore is public, but not in __all__
    connect = partial(exported.TCPStore, wait_for_workers=False)  # who is unfit is heard of before
    agents = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        agents = connect(address, port, timeout=timeout)
        address, port = LOOPBACK if _on_one_node(process) else address, 0
    if process.rank == 0:
        port, listening = _listen(address, port)
        store = connect(address, port, is_master=True, timeout=timeout, master_listen_fd=listening)
        if agents is not None:
            agents.set(_PORT, str(port))
        return store
    if agents is None and unfit is None:
        return connect(address, port, timeout=timeout)

    def there() -> bool:
        nonlocal port
        if agents is not None:
            port = int(agents.get(_PORT)) if agents.check([_PORT]) else 0  # or of an earlier start
        return port > 0 and _answers(address, port)

    waiting = "" if unfit is None else f"waiting for rank 0, to tell it: {unfit}"
    if not _wait_until(there, timeout_s=timeout.total_seconds(), waiting=waiting):
        raise RuntimeError("rank 0 is not there")
    return connect(address, port, timeout=timeout)


def _answers(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), _QUIET_S):
        return True
    return False


def _wait_until(
    there: Callable[[], bool], *, timeout_s: float = math.inf, waiting: str = ""
) -> bool:
    """Ask less and less often; say what for, if it takes long. False: it took too long."""
    begin, pause_s = time.monotonic(), _FIRST_PAUSE_S
    while not there():
        waited_s = time.monotonic() - begin
        if waited_s > timeout_s:
            return False
        if waiting and waited_s > _QUIET_S:
            log.warning("%s", waiting)
            waiting = ""
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
    return True


def _texts_in(store: Any) -> Any:
    """What ranks leave for each other in a store, apart from what torch keeps there."""
    exported: Any = dist
    return exported.PrefixStore("dinoscale", store)


def _require_fit(store: Any, process: Process, unfit: Exception | None) -> None:
    """Wait until all ranks are fit to begin, or one says that it is not.

    Raises:
        Exception: `unfit`, when all have heard of it, or have had time enough.
        LaunchError: another rank is unfit.
        RuntimeError: they did not come, or rank 0 is gone.
    """
    own = f"rank {process.rank} ({socket.gethostname()})"
    if unfit is not None:
        store.compare_set(_FITNESS, "", f"{own}: {_told(unfit).text}")
    elif store.add("fit", 1) == process.world_size:
        store.compare_set(_FITNESS, "", _FIT)
    store.wait([_FITNESS])
    verdict = store.get(_FITNESS).decode()
    if verdict == _FIT and unfit is None:
        return
    if verdict != _FIT:  # else a job at work, of which this process is none
        with contextlib.suppress(dist.DistError, RuntimeError):  # rank 0 is gone
            _stay_for_all(store, process, verdict)
    raise unfit or LaunchError(verdict)


def _stay_for_all(store: Any, process: Process, verdict: str) -> None:
    """Wait until all have heard the verdict: with the first that ends, a launcher ends its node.

    No longer than a slow start of Python takes.
    """
    if store.add("heard", 1) == process.world_size:
        store.set(_ALL_HEARD, "")
    _wait_until(
        lambda: bool(store.check([_ALL_HEARD])),
        timeout_s=_TELL_S,
        waiting=f"waiting for the other ranks, to tell them: {verdict}",
    )


def _use_device(process: Process) -> None:
    """Take the accelerator of this rank, or its share of the cores."""
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed a search and a warning
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_of_rank(process.local_world_size))


def _meeting_place(process: Process, environ: MutableMapping[str, str]) -> tuple[str, int]:
    """Where the ranks meet; those of one node on loopback, which no other machine reaches."""
    if process.world_size == 1 and "MASTER_PORT" not in environ:
        address, port = LOOPBACK, free_port()
    else:
        address, port = meeting_place(process, environ)
    served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not _on_one_node(process) and address not in (LOOPBACK, "localhost"):
        return address, port
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
        environ.setdefault(variable, loopback[0])  # for what these open besides
    return (address if served else LOOPBACK), port


def _on_one_node(process: Process) -> bool:
    return process.knows_node and process.local_world_size == process.world_size


def _allow_open_files() -> None:
    """Raise the soft limit of open files, often 1024: all ranks connect to rank 0, and not once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # the doctor says what is missing
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def require_devices(process: Process, *, num_devices: int) -> None:
    """Refuse more ranks on a node than it has accelerators; on none, ranks share the CPU.

    Raises:
        LaunchError: on every rank of the node, if a launcher told how many they are.
    """
    ranks = process.local_rank + 1
    if process.knows_node:
        ranks = max(ranks, process.local_world_size)
    if num_devices and ranks > num_devices:
        raise LaunchError(
            f"{ranks} ranks (LOCAL_RANK={process.local_rank}) but {num_devices} accelerators that"
            f" rank {process.rank} can see on {socket.gethostname()}; start {num_devices} ranks on"
            " it, and let each see all of them (srun: no --gpus-per-task)"
        )


def _lack_of_device(process: Process) -> LaunchError | None:
    """Take the device of this rank; why that cannot be."""
    try:
        require_devices(process, num_devices=torch.cuda.device_count())
        _use_device(process)
    except LaunchError as error:
        return error
    except RuntimeError as error:  # as CUDA says it, in many lines
        first = (str(error).splitlines() or [""])[0]
        return LaunchError(f"{process.device} cannot be used: {first}")
    return None


def free_port() -> int:
    """A TCP port that nobody on this machine uses right now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _listen(address: str, port: int) -> tuple[int, int]:
    """Port, and a socket that listens there, on loopback alone if the ranks meet there.

    0 is any free one.
    """
    dual = address != LOOPBACK and socket.has_dualstack_ipv6()
    try:
        listening = socket.create_server(
            (LOOPBACK if address == LOOPBACK else "", port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            backlog=socket.SOMAXCONN,
            dualstack_ipv6=dual,
        )
        return listening.getsockname()[1], listening.detach()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise LaunchError(
            f"port {port} (MASTER_PORT) cannot be used on this machine: {reason};"
            " choose another, for example `deepspeed --master_port 29501 ...`"
        ) from None


def stop() -> None:
    """Leave the process group in good order, together, once what was begun has ended.

    Without it, or amid a collective, some backends abort the interpreter at exit. And the board
    goes with rank 0, so that no rank leaves before all others are here, or lost.
    """
    global _client
    if dist.is_initialized():
        for work in _under_way:
            work.wait()
        with contextlib.suppress(LostPeerError):
            gather_objects(None)
        dist.destroy_process_group()
    _under_way.clear()
    _client = None


def world_size() -> int:
    """Number of processes of the job; 1 before `start`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Global rank of this process; 0 before `start`."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor`, on any device, over ranks in place and return it."""
    if world_size() > 1:
        there = tensor.to(_backend_device(tensor))
        guarded(lambda: dist.all_reduce(there))
        _bring_back(there, tensor)
    return tensor


def broadcast(tensor: Tensor) -> None:
    """Give every rank's `tensor`, on any device, the values of rank 0's, in place."""
    if world_size() > 1:
        there = tensor.to(_backend_device(tensor))
        guarded(lambda: dist.broadcast(there, src=0))
        _bring_back(there, tensor)


def all_gather_flat(whole: Tensor, part: Tensor) -> None:
    """Fill `whole`, (W * n,), with every rank's `part`, (n,), which may be a slice of it."""
    begin_all_gather_flat(whole, part)()


def begin_all_gather_flat(whole: Tensor, part: Tensor) -> Callable[[], None]:
    """Begin `all_gather_flat`; call the result before `whole` is used or `part` changes."""
    if world_size() == 1:
        if whole.data_ptr() != part.data_ptr():
            whole.copy_(part)
        return lambda: None
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in 2.13
    there, own = whole.to(_backend_device(whole)), part.to(_backend_device(part))
    work = guarded(lambda: gather(there, own, async_op=True))
    _under_way.append(work)

    def finish() -> None:
        guarded(work.wait)
        _under_way.remove(work)
        _bring_back(there, whole)

    return finish


def _backend_device(tensor: Tensor) -> torch.device:
    """Where the backend takes `tensor`: where it is, or (a CPU tensor, NCCL) the accelerator."""
    kinds = [entry.partition(":")[0] for entry in dist.get_backend_config().split(",")]
    if tensor.device.type in kinds:
        return tensor.device
    return torch.device(kinds[0], int(os.environ["LOCAL_RANK"]))  # as `start` has chosen


def _bring_back(there: Tensor, tensor: Tensor) -> None:
    if there is not tensor:
        tensor.copy_(there)


def gather_objects(value: T) -> list[T]:
    """One picklable value of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    guarded(lambda: dist.all_gather_object(values, value))
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    guarded(lambda: dist.broadcast_object_list(box, src=0))
    return box[0]


def gather_rows(part: Tensor) -> Tensor:
    """Rows of all ranks, in rank order, on every rank; each gives any number of one width.

    Args:
        part: (N of this rank, ...); one without rows may have another width.

    Returns:
        (sum of N, ...) on the device of `part`; one process gets `part` itself.

    Raises:
        RunFailedError: on every rank; one has no memory for it.
    """
    if world_size() == 1:
        return part
    shapes = gather_objects(tuple(part.shape))
    shape = sum(rows for rows, *_ in shapes), *max(shapes)[1:]
    # A rank that has no room for it says so, instead of leaving the others in a collective.
    whole = together(lambda: part.new_empty(shape, device=_backend_device(part)))
    for source, rows in enumerate(whole.split([shape[0] for shape in shapes])):
        if len(rows):
            if source == rank():
                rows.copy_(part)
            guarded(partial(dist.broadcast, rows, src=source))
    return whole.to(part.device)


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """Sum over ranks as a function autograd can differentiate (synchronised batch norm)."""
    if world_size() == 1:
        return tensor
    summed: Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]  # torch has no types here
    return summed


class _Sum(torch.autograd.Function):
    """y_r = sum over ranks of x; so dL/dx_r is the sum over ranks of dL_r/dy."""

    @staticmethod
    def forward(_context: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.clone())


def together(check: Callable[[], T]) -> T:
    """Run `check` on every rank; if it fails on any, every rank raises, so that nobody waits.

    All raise the same type, so that those who handle it go on alike.

    Raises:
        DinoscaleError: the error of the first rank that failed, with its exit code.
        RunFailedError: that error is none that a user can act on, as a want of memory; or a rank
            has left other collectives than this one unfinished.
        Exception: the rank's own, whatever it is, where it counts as that type.
    """
    result, error = None, None
    try:
        result = check()
    except Exception as caught:
        error = caught
    # As a type and a text: exceptions of libraries need not survive the way to another process.
    own = _told(error)
    for number, other in enumerate(gather_objects(own)):
        if not isinstance(other, _Verdict):  # an error left a collective inside `check` on a rank
            raise error or RunFailedError(
                f"ranks are no longer at the same place: rank {number} sent {type(other).__name__}"
                f" where rank {rank()} waited for a verdict; the log of a rank that failed says why"
            )
        if other.kind is not None:
            if error is not None and own.kind is other.kind:
                raise error
            raise other.kind(f"rank {number}: {other.text}") from error
    return result  # type: ignore[return-value]  # no error on any rank, so check() returned


class _Verdict(NamedTuple):
    """What other ranks raise for an error of this one, if there is one."""

    kind: type[DinoscaleError] | None = None
    text: str = ""


def _told(error: Exception | None) -> _Verdict:
    """The verdict on `error`: its nearest type that is made of a text alone."""
    if error is None:
        return _Verdict()
    for kind in type(error).__mro__:
        if issubclass(kind, DinoscaleError) and kind.__init__ is Exception.__init__:
            return _Verdict(kind, str(error))
    return _Verdict(RunFailedError, f"{type(error).__name__}: {error}")


def guarded(communicate: Callable[[], T]) -> T:
    """Do what communicates; a lost peer becomes a sentence instead of a backend's stack.

    Raises:
        LostPeerError: another rank ended or cannot be reached.
    """
    try:
        return communicate()
    except (dist.DistError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        if not isinstance(error, dist.DistError) and not _LOST_PEER.search(first):
            raise
        raise LostPeerError(f"rank {rank()} lost contact with another rank ({first})") from error


class Board:
    """Short texts that ranks leave for each other, from any thread, without a collective.

    It lies in the store in which the ranks met. All boards of a process share a connection, on
    which nobody waits for long: a question is answered at once, by a text or by None.
    """

    def __init__(self) -> None:
        """Connect; after `start`, on every rank that wants to read or post."""
        global _client
        self._store: Any = None
        self._here: dict[str, str] = {}  # of a single process
        if world_size() > 1:
            exported: Any = dist  # TCPStore is public, but not in __all__
            if _client is None:
                address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                _client = self._try(
                    lambda: exported.TCPStore(
                        address, port, is_master=False, timeout=_STORE_TIMEOUT
                    )
                )
            self._store = _texts_in(_client)

    def post(self, key: str, text: str) -> None:
        """Leave `text` under `key`, over what was there.

        Raises:
            LostPeerError: the store, and with it rank 0, cannot be reached.
        """
        if self._store is None:
            self._here[key] = text
        else:
            self._try(lambda: self._store.set(key, text))

    def post_first(self, key: str, text: str) -> str:
        """Leave `text` under `key` unless something is there; what is there then.

        Raises:
            LostPeerError: as `post`.
        """
        if self._store is None:
            return self._here.setdefault(key, text)
        return str(self._try(lambda: self._store.compare_set(key, "", text)).decode())

    def count(self, key: str, more: int = 1) -> int:
        """Add to the number under `key`, which begins at 0; the sum.

        Raises:
            LostPeerError: as `post`.
        """
        if self._store is None:
            self._here[key] = str(int(self._here.get(key, "0")) + more)
            return int(self._here[key])
        return int(self._try(lambda: self._store.add(key, more)))

    def read(self, key: str) -> str | None:
        """The text under `key`, None if nobody has left one.

        Raises:
            LostPeerError: as `post`.
        """
        return self.read_all([key])[0]

    def read_all(self, keys: Sequence[str]) -> list[str | None]:
        """The text under each key or None, in two requests where all are there.

        Raises:
            LostPeerError: as `post`.
        """
        if self._store is None:
            return [self._here.get(key) for key in keys]
        if self._has(keys):
            return [*self._texts(keys)]
        if len(keys) == 1:
            return [None]
        middle = len(keys) // 2  # few are missing: each costs the logarithm of the number of keys
        return self.read_all(keys[:middle]) + self.read_all(keys[middle:])

    def wait_for(self, keys: Sequence[str]) -> list[str]:
        """The texts under all keys, once they are there; asks less and less often.

        Raises:
            LostPeerError: as `post`.
        """
        _wait_until(partial(self._has, keys))
        return self._texts(keys)

    def forget(self, keys: Sequence[str]) -> None:
        """Take away what nobody will read again.

        Raises:
            LostPeerError: as `post`.
        """
        for key in keys:
            if self._store is None:
                self._here.pop(key, None)
            else:
                self._try(partial(self._store.delete_key, key))

    def _has(self, keys: Sequence[str]) -> bool:
        if self._store is None:
            return all(key in self._here for key in keys)
        return bool(self._try(lambda: self._store.check([*keys])))

    def _texts(self, keys: Sequence[str]) -> list[str]:
        if self._store is None:
            return [self._here[key] for key in keys]
        return [text.decode() for text in self._try(lambda: self._store.multi_get([*keys]))]

    def _try(self, talk: Callable[[], T]) -> T:
        try:
            return talk()
        except (dist.DistError, RuntimeError) as error:
            raise LostPeerError("rank 0, where the ranks meet, cannot be reached") from error
