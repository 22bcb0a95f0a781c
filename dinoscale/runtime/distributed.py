"""The process group: how ranks meet, and the few collectives that dinoscale needs.

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
from dinoscale.runtime.cores import cores_per_rank
from dinoscale.runtime.float32 import exact_float32
from dinoscale.runtime.launcher_env import LOOPBACK, Process, rendezvous_address

log = logging.getLogger(__name__)
T = TypeVar("T")

_pending: list[Any] = []  # collectives that were begun and not yet waited for
_client: Any = None  # the one connection of this process to the store where the ranks met

TIMEOUT_S = 1800.0  # slow nodes may take minutes to come up
MAX_OPEN_FILES = 65536  # open files of a process; enough for ten thousand ranks
_STORE_TIMEOUT = timedelta(seconds=60)  # of a small message; a busy node may take its time
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0  # polling; a thousand ranks ask 500 times a second
_PORT = "dinoscale/port"  # key in torchrun's store, of the port of rank 0's store
_VERDICT, _READY, _ALL_READ = "verdict", "ready", "all read"
_REPORT_S, _QUIET_S = 60.0, 3.0  # to tell others why this rank ends; before it logs that it waits
_LOST_PEER = re.compile(r"gloo|nccl|connection|peer|timed out|socket", re.IGNORECASE)


def start(
    process: Process, *, timeout_s: float = TIMEOUT_S, startup_error: Exception | None = None
) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and export its environment variables.

    Args:
        process: this process.
        timeout_s: how long to wait for the others, now and in every collective.
        startup_error: why this rank cannot take part, such as a mistake in its configuration. The
            rank only tells the others, which would otherwise wait for it until the time-out.

    Raises:
        LaunchError: the address is unknown, its port is taken on this machine, or there are fewer
            accelerators than ranks; or another rank cannot take part, and the text says which and
            why.
        Exception: `startup_error` itself.
    """
    environ = os.environ
    exact_float32()
    startup_error = startup_error or _device_error(process)
    _allow_open_files()
    address, port = _rendezvous_address(process, environ)
    environ["RANK"], environ["WORLD_SIZE"] = str(process.rank), str(process.world_size)
    environ["LOCAL_RANK"] = str(process.local_rank)
    timeout = timedelta(seconds=timeout_s if startup_error is None else min(timeout_s, _REPORT_S))
    # DeepSpeed sets no time-out for its groups, and NCCL's default is 10 minutes.
    defaults: Any = dist.distributed_c10d
    defaults.default_pg_timeout = defaults.default_pg_nccl_timeout = timeout
    try:
        store = _store_of_rank_0(
            process, address, port, timeout=timeout, startup_error=startup_error
        )
        environ["MASTER_ADDR"], environ["MASTER_PORT"] = store.host, str(store.port)
        _require_all_ready(_own_keys(store), process, startup_error)
        dist.init_process_group(
            "nccl" if process.device.type == "cuda" else "gloo",
            store=store,
            rank=process.rank,
            world_size=process.world_size,
            timeout=timeout,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        if startup_error is not None:
            raise startup_error from None
        first = str(error).splitlines()[0]
        raise LaunchError(
            f"rank {process.rank} of {process.world_size} ({socket.gethostname()}) could not meet"
            f" the others at {address}:{port}: {first}; check that all were started, that rank 0"
            " runs there and that the port is free and reachable"
        ) from error


def _store_of_rank_0(
    process: Process,
    address: str,
    port: int,
    *,
    timeout: timedelta,
    startup_error: Exception | None,
) -> Any:
    """Connect to a store on rank 0 that is new at every start, without keys of an earlier one.

    torchrun keeps its own store over restarts, and its nodes count restarts differently: that store
    only tells where the new one is.

    Raises:
        LaunchError: this is rank 0, and the port is taken.
        DistError: rank 0 is not there.
    """
    exported: Any = dist  # TCPStore is public, but not in __all__
    connect = partial(exported.TCPStore, wait_for_workers=False)  # startup errors come first
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
    if agents is None and startup_error is None:
        return connect(address, port, timeout=timeout)

    def there() -> bool:
        nonlocal port
        if agents is not None:
            port = int(agents.get(_PORT)) if agents.check([_PORT]) else 0  # or of an earlier start
        return port > 0 and _answers(address, port)

    waiting = "" if startup_error is None else f"waiting for rank 0, to tell it: {startup_error}"
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
    """Poll with growing pauses, and log `waiting` after a while; False on time-out."""
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


def _own_keys(store: Any) -> Any:
    """Our part of a store, apart from the keys of torch."""
    exported: Any = dist
    return exported.PrefixStore("dinoscale", store)


def _require_all_ready(store: Any, process: Process, startup_error: Exception | None) -> None:
    """Wait until all ranks are ready, or one says that it cannot take part.

    Raises:
        Exception: `startup_error`, once all have read it or have had time enough.
        LaunchError: another rank cannot take part.
        RuntimeError: some did not come, or rank 0 is gone.
    """
    own = f"rank {process.rank} ({socket.gethostname()})"
    if startup_error is not None:
        store.compare_set(_VERDICT, "", f"{own}: {_verdict_on(startup_error).text}")
    elif store.add("num ready", 1) == process.world_size:
        store.compare_set(_VERDICT, "", _READY)
    store.wait([_VERDICT])
    verdict = store.get(_VERDICT).decode()
    if verdict == _READY and startup_error is None:
        return
    if verdict != _READY:  # else the job runs already, without this process
        with contextlib.suppress(dist.DistError, RuntimeError):  # rank 0 is gone
            _wait_for_readers(store, process, verdict)
    raise startup_error or LaunchError(verdict)


def _wait_for_readers(store: Any, process: Process, verdict: str) -> None:
    """Wait until all have read the verdict: a launcher ends a node with the first rank that exits.

    No longer than a slow start of Python takes.
    """
    if store.add("num read", 1) == process.world_size:
        store.set(_ALL_READ, "")
    _wait_until(
        lambda: bool(store.check([_ALL_READ])),
        timeout_s=_REPORT_S,
        waiting=f"waiting for the other ranks, to tell them: {verdict}",
    )


def _use_device(process: Process) -> None:
    """Select the accelerator of this rank, or limit it to its share of the cores."""
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed a search and a warning
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_per_rank(process.local_world_size))


def _rendezvous_address(process: Process, environ: MutableMapping[str, str]) -> tuple[str, int]:
    """Address and port where the ranks meet: loopback on one node, out of reach of others."""
    if process.world_size == 1 and "MASTER_PORT" not in environ:
        address, port = LOOPBACK, free_port()
    else:
        address, port = rendezvous_address(process, environ)
    served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not _on_one_node(process) and address not in (LOOPBACK, "localhost"):
        return address, port
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
        environ.setdefault(variable, loopback[0])  # for the connections that these open
    return (address if served else LOOPBACK), port


def _on_one_node(process: Process) -> bool:
    return process.knows_node and process.local_world_size == process.world_size


def _allow_open_files() -> None:
    """Raise the soft limit of open files, often 1024: each rank opens several to rank 0."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # the doctor reports a limit that is too low
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def require_devices(process: Process, *, num_devices: int) -> None:
    """Refuse more ranks on a node than it has accelerators; without any, ranks share the CPU.

    Raises:
        LaunchError: on every rank of the node, if the launcher sets their number.
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


def _device_error(process: Process) -> LaunchError | None:
    """Select the device of this rank, and return the error if that fails."""
    try:
        require_devices(process, num_devices=torch.cuda.device_count())
        _use_device(process)
    except LaunchError as error:
        return error
    except RuntimeError as error:  # CUDA's have many lines
        first = (str(error).splitlines() or [""])[0]
        return LaunchError(f"{process.device} cannot be used: {first}")
    return None


def free_port() -> int:
    """A TCP port that is free on this machine right now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _listen(address: str, port: int) -> tuple[int, int]:
    """Port, and the descriptor of a socket that listens there, on loopback alone for one node.

    Port 0 takes any free one.
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
    """Leave the process group together with all ranks, once pending collectives have ended.

    Without this, or within a collective, some backends abort the interpreter at exit. The store
    ends with rank 0, so no rank leaves before all others have come here or are lost.
    """
    global _client
    if dist.is_initialized():
        for work in _pending:
            work.wait()
        with contextlib.suppress(LostPeerError):
            gather_objects(None)
        dist.destroy_process_group()
    _pending.clear()
    _client = None


def next_meeting() -> dict[str, str]:
    """Variables by which the ranks of this job meet again after a restart; collective.

    On another port: where they met this time, rank 0 may still listen when the others come.
    """
    if world_size() == 1:
        return {}
    port = broadcast_object(free_port() if rank() == 0 else None)
    address = os.environ["MASTER_ADDR"]  # as `start` exported it
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


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
        _copy_back(there, tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Replace `tensor`, on any device, by its largest values over ranks and return it."""
    if world_size() > 1:
        there = tensor.to(_backend_device(tensor))
        guarded(lambda: dist.all_reduce(there, op=dist.ReduceOp.MAX))
        _copy_back(there, tensor)
    return tensor


def broadcast(tensor: Tensor) -> None:
    """Give every rank's `tensor`, on any device, the values of rank 0's, in place."""
    if world_size() > 1:
        there = tensor.to(_backend_device(tensor))
        guarded(lambda: dist.broadcast(there, src=0))
        _copy_back(there, tensor)


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
    _pending.append(work)

    def finish() -> None:
        guarded(work.wait)
        _pending.remove(work)
        _copy_back(there, whole)

    return finish


def _backend_device(tensor: Tensor) -> torch.device:
    """Device where the backend takes `tensor`: its own, or the accelerator (CPU tensor, NCCL)."""
    kinds = [entry.partition(":")[0] for entry in dist.get_backend_config().split(",")]
    if tensor.device.type in kinds:
        return tensor.device
    return torch.device(kinds[0], int(os.environ["LOCAL_RANK"]))  # as `start` has chosen


def _copy_back(there: Tensor, tensor: Tensor) -> None:
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
    """Concatenate the rows of all ranks, in rank order, on every rank.

    Args:
        part: (N of this rank, ...); all have one width, but one without rows may have any.

    Returns:
        (sum of N, ...) on the device of `part`; one process gets `part` itself.

    Raises:
        RunFailedError: on every rank, if one has no memory for the result.
    """
    if world_size() == 1:
        return part
    shapes = gather_objects(tuple(part.shape))
    shape = sum(rows for rows, *_ in shapes), *max(shapes)[1:]
    # A rank without the memory makes all raise, instead of leaving the others in a collective.
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


def gather_with_gradient(part: Tensor) -> Tensor:
    """Every rank's part (n, ...), one after the other, (W * n, ...), for autograd.

    dL/dpart is the sum over ranks of their gradients, as the sum of all ranks' losses has it.
    """
    if world_size() == 1:
        return part
    whole: Tensor = _Gather.apply(part)  # type: ignore[no-untyped-call]  # torch has no types here
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, part: Tensor) -> Tensor:
        whole = part.new_empty(world_size() * len(part), *part.shape[1:])
        all_gather_flat(whole.view(-1), part.contiguous().view(-1))
        return whole

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        summed = all_reduce_sum(gradient.clone())
        return summed.chunk(world_size())[rank()]


def together(check: Callable[[], T]) -> T:
    """Run `check` on every rank; if it fails on any, every rank raises, so that none waits.

    All raise the same type, so that all handle it alike.

    Raises:
        DinoscaleError: the error of the first rank that failed, with its exit code.
        RunFailedError: no user can act on that error, such as a lack of memory; or a rank left
            another collective unfinished.
        Exception: on a rank that failed, its own error, where it counts as that type.
    """
    result, error = None, None
    try:
        result = check()
    except Exception as caught:
        error = caught
    # A type and a text: exceptions of libraries may not survive pickling.
    own = _verdict_on(error)
    for number, other in enumerate(gather_objects(own)):
        if not isinstance(other, _Verdict):  # an error left a collective inside `check` on a rank
            raise error or RunFailedError(
                f"ranks are out of step: rank {number} sent {type(other).__name__} where rank"
                f" {rank()} waited for a verdict; the log of a rank that failed says why"
            )
        if other.kind is not None:
            if error is not None and own.kind is other.kind:
                raise error
            raise other.kind(f"rank {number}: {other.text}") from error
    return result  # type: ignore[return-value]  # no error on any rank, so check() returned


class _Verdict(NamedTuple):
    """The error that other ranks raise for one of this rank; no kind where there is none."""

    kind: type[DinoscaleError] | None = None
    text: str = ""


def _verdict_on(error: Exception | None) -> _Verdict:
    """Text of `error`, and its nearest type that takes a text alone."""
    if error is None:
        return _Verdict()
    for kind in type(error).__mro__:
        if issubclass(kind, DinoscaleError) and kind.__init__ is Exception.__init__:
            return _Verdict(kind, str(error))
    return _Verdict(RunFailedError, f"{type(error).__name__}: {error}")


def guarded(communicate: Callable[[], T]) -> T:
    """Communicate, and raise one sentence for a lost peer instead of the backend's stack trace.

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


class KeyValueStore:
    """Short texts that ranks share by key, from any thread, without a collective.

    It is the store where the ranks met. All instances of a process share one connection, and no
    request blocks it: a read returns at once, a text or None.
    """

    def __init__(self) -> None:
        """Connect, after `start`, on every rank that reads or writes."""
        global _client
        self._store: Any = None
        self._local: dict[str, str] = {}  # of a single process
        if world_size() > 1:
            exported: Any = dist  # TCPStore is public, but not in __all__
            if _client is None:
                address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                _client = self._try(
                    lambda: exported.TCPStore(
                        address, port, is_master=False, timeout=_STORE_TIMEOUT
                    )
                )
            self._store = _own_keys(_client)

    def set(self, key: str, text: str) -> None:
        """Write `text` under `key`, over what was there.

        Raises:
            LostPeerError: the store, and with it rank 0, cannot be reached.
        """
        if self._store is None:
            self._local[key] = text
        else:
            self._try(lambda: self._store.set(key, text))

    def set_default(self, key: str, text: str) -> str:
        """Write `text` under `key` unless it has one already; return what is there then.

        Raises:
            LostPeerError: as `set`.
        """
        if self._store is None:
            return self._local.setdefault(key, text)
        return str(self._try(lambda: self._store.compare_set(key, "", text)).decode())

    def add(self, key: str, more: int = 1) -> int:
        """Add to the number under `key`, which begins at 0, and return the sum.

        Raises:
            LostPeerError: as `set`.
        """
        if self._store is None:
            self._local[key] = str(int(self._local.get(key, "0")) + more)
            return int(self._local[key])
        return int(self._try(lambda: self._store.add(key, more)))

    def get(self, key: str) -> str | None:
        """The text under `key`, None if there is none.

        Raises:
            LostPeerError: as `set`.
        """
        return self.get_all([key])[0]

    def get_all(self, keys: Sequence[str]) -> list[str | None]:
        """The text under each key or None, in two requests where all are there.

        Raises:
            LostPeerError: as `set`.
        """
        if self._store is None:
            return [self._local.get(key) for key in keys]
        if self._has(keys):
            return [*self._texts(keys)]
        if len(keys) == 1:
            return [None]
        middle = len(keys) // 2  # few are missing: each costs the logarithm of the number of keys
        return self.get_all(keys[:middle]) + self.get_all(keys[middle:])

    def wait_for(self, keys: Sequence[str]) -> list[str]:
        """The texts under all keys, once they are there; polls with growing pauses.

        Raises:
            LostPeerError: as `set`.
        """
        _wait_until(partial(self._has, keys))
        return self._texts(keys)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete keys that nobody will read again.

        Raises:
            LostPeerError: as `set`.
        """
        for key in keys:
            if self._store is None:
                self._local.pop(key, None)
            else:
                self._try(partial(self._store.delete_key, key))

    def _has(self, keys: Sequence[str]) -> bool:
        if self._store is None:
            return all(key in self._local for key in keys)
        return bool(self._try(lambda: self._store.check([*keys])))

    def _texts(self, keys: Sequence[str]) -> list[str]:
        if self._store is None:
            return [self._local[key] for key in keys]
        return [text.decode() for text in self._try(lambda: self._store.multi_get([*keys]))]

    def _try(self, talk: Callable[[], T]) -> T:
        try:
            return talk()
        except (dist.DistError, RuntimeError) as error:
            raise LostPeerError("rank 0, where the ranks meet, cannot be reached") from error
