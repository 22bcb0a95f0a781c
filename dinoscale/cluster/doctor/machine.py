"""Check each node: accelerators, CPU cores, threads, shared memory, speed of bf16."""

import math
import os
import resource
import shutil
import socket
import statistics
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from dinoscale.cluster.doctor.report import Check, count_text, ok, problem, size_text, warning
from dinoscale.config import RunConfig
from dinoscale.engine.precision import matrix_product_s
from dinoscale.runtime.cores import core_quota, cpu_affinity
from dinoscale.runtime.hosts import ranks_text
from dinoscale.runtime.launcher_env import Process

SHARED_MEMORY = Path("/dev/shm")
_SMALL_SHARED_BYTES = 512 * 2**20  # Docker gives 64 MiB unless told otherwise
_FREE_FRACTION = 0.9  # of a device's memory; our own context takes about half a GB
# Connections of a rank to the store where all meet: torch's, ours, and one that NCCL may open.
_STORE_FILES = 3
_GLOO_FILES = 2  # per other rank, one for each group: all ranks, and DeepSpeed's copy of it
_OWN_FILES = 256  # libraries, logs, shards, pipes of data workers
_SLOWER = 1.2  # ratio of times beyond the noise of a short measurement
_STRAGGLES = {"cuda": 1.3, "cpu": 3.0}  # times the median of all ranks; CPUs also do other work
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # vendor and class of a device on the PCI bus
_HIDDEN = "CUDA_VISIBLE_DEVICES hides all"


@dataclass(frozen=True)
class Device:
    """The accelerator of one rank."""

    name: str
    total_bytes: int
    free_bytes: int
    one_process: bool = False  # at a time (EXCLUSIVE_PROCESS)


@dataclass(frozen=True)
class Machine:
    """Facts of one rank about its node.

    Attributes:
        host: name of the node.
        num_devices: accelerators that torch can use.
        device: the accelerator of this rank, None on a CPU.
        why_no_device: why an accelerator that should be there is not, or None.
        cores: numbers of the CPU cores this process may use.
        quota: cores that the container allows, None without a limit.
        threads: of torch in this process.
        shared_free_bytes: free bytes in /dev/shm, None if it does not exist.
        open_files: limit of open files of the process that serves the store of the ranks.
        product_s: seconds of a matrix product by precision.
    """

    host: str
    num_devices: int
    device: Device | None
    why_no_device: str | None
    cores: frozenset[int]
    quota: float | None
    threads: int
    shared_free_bytes: int | None
    open_files: int
    product_s: dict[str, float]


def look(process: Process) -> Machine:
    """Gather the facts of this node; after `distributed.start`, which sets device and threads."""
    available = torch.cuda.is_available()
    device = None
    if available:
        free, total = torch.cuda.mem_get_info(process.device)
        name = torch.cuda.get_device_name(process.device)
        device = Device(name, total, free, _one_process(process.device))
    return Machine(
        host=socket.gethostname(),
        num_devices=torch.cuda.device_count() if available else 0,
        device=device,
        why_no_device=None if available else _why_no_device(),
        cores=cpu_affinity(),
        quota=core_quota(),
        threads=torch.get_num_threads(),
        shared_free_bytes=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        open_files=_open_files(),
        product_s=matrix_product_s(),
    )


def _one_process(device: torch.device) -> bool:
    """Whether a device refuses a second process, as far as nvidia-smi reports."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    ask = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=compute_mode", "--format=csv,noheader"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return said.startswith("Exclusive")


def _open_files() -> int:
    """The limit of this process, which `start` has raised; under torchrun, the one of torchrun."""
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    with suppress(OSError):
        if served and hasattr(resource, "prlimit"):
            return resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)[0]
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _why_no_device() -> str | None:
    """Why torch finds no accelerator where there should be one; None on a machine without any."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not _should_have_device():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs only"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return _HIDDEN
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error).splitlines() or ["unknown reason"])[0][:200].rstrip(".")
    return "torch gives no reason"


def _should_have_device() -> bool:
    """Whether driver, PCI bus or Slurm report an accelerator; a failed driver shows no device."""
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists():
        return True
    if os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_GPUS_ON_NODE", "0") not in (
        "",
        "0",
    ):
        return True
    return any(
        _word(vendor) == _NVIDIA and _word(vendor.with_name("class")).startswith(_DISPLAY)
        for vendor in Path("/sys/bus/pci/devices").glob("*/vendor")
    )


def _word(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def judge_devices(machines: Sequence[Machine]) -> list[Check]:
    """Judge the accelerators: available, free, of one kind, and one for each rank."""
    hosts = [machine.host for machine in machines]
    without = [rank for rank, machine in enumerate(machines) if machine.device is None]
    if without:
        return [_no_device(machines, without, hosts)]
    checks = []
    for host in dict.fromkeys(hosts):
        ranks, there = hosts.count(host), machines[hosts.index(host)].num_devices
        if ranks < there:
            checks.append(
                warning(
                    "devices",
                    f"{ranks} of {there} accelerators of {host} are used;"
                    " start one rank for each, as the launchers do",
                )
            )
    devices = [machine.device for machine in machines if machine.device is not None]
    for rank, device in enumerate(devices):
        if device.free_bytes < _FREE_FRACTION * device.total_bytes:
            checks.append(
                warning(
                    "devices",
                    f"{size_text(device.total_bytes - device.free_bytes)} of"
                    f" {size_text(device.total_bytes)} are in use on the accelerator of"
                    f" {ranks_text([rank], hosts)}; end the other program (see nvidia-smi)",
                )
            )
    kinds = list(dict.fromkeys(device.name for device in devices))
    if len(kinds) > 1:
        checks.append(
            warning("devices", f"the slowest of {', '.join(kinds)} limits all; use one kind")
        )
    said = f"{len(devices)} x {kinds[0]} with {size_text(devices[0].total_bytes)}"
    return checks or [ok("devices", said)]


def _no_device(machines: Sequence[Machine], without: list[int], hosts: list[str]) -> Check:
    odd = [rank for rank in without if machines[rank].why_no_device]
    why = machines[odd[0]].why_no_device if odd else "there is none"
    if len(without) < len(machines):
        return problem(
            "devices",
            f"{ranks_text(without, hosts)} without an accelerator ({why}), others have one;"
            " repair the driver of that node, or leave it out",
        )
    if odd:
        return (warning if why == _HIDDEN else problem)(
            "devices",
            f"training would use the CPU: torch finds no accelerator on {hosts[odd[0]]} ({why});"
            " check nvidia-smi and that torch is built for this driver, or set DS_ACCELERATOR=cpu"
            " to train on the CPU",
        )
    return ok("devices", f"no accelerator on {_names(hosts)}, training uses the CPU")


def _names(hosts: list[str]) -> str:
    names = list(dict.fromkeys(hosts))
    return names[0] if len(names) == 1 else f"{len(names)} nodes"


def judge_cores(machines: Sequence[Machine], *, num_workers: int | None) -> list[Check]:
    """Judge the CPU cores of each node by its data workers and threads.

    Args:
        machines: of all ranks.
        num_workers: loader processes per rank; None without a configuration.
    """
    checks = []
    hosts = [machine.host for machine in machines]
    for host in dict.fromkeys(hosts):
        here = [machine for machine in machines if machine.host == host]
        cores = len(frozenset().union(*(machine.cores for machine in here)))
        quota = here[0].quota
        if quota is not None:
            cores = max(1, min(cores, math.ceil(quota)))
        workers = len(here) * (num_workers or 0)
        if workers > cores:
            checks.append(
                warning(
                    "cores",
                    f"{workers} data workers of {count_text(len(here), 'rank')} share"
                    f" {cores} cores of {host}; data.num_workers={max(1, cores // len(here))} fits",
                )
            )
        threads = sum(machine.threads for machine in here)
        if here[0].device is None and threads > cores:
            checks.append(
                warning(
                    "cores",
                    f"{count_text(len(here), 'rank')} run {threads} threads on {cores} cores"
                    f" of {host}; set OMP_NUM_THREADS={max(1, cores // len(here))}",
                )
            )
        if not checks:
            checks.append(
                ok(
                    "cores",
                    f"{cores} of {host} for {count_text(len(here), 'rank')}, each with"
                    f" {count_text(here[0].threads, 'thread')} and"
                    f" {count_text(num_workers or 0, 'data worker')}",
                )
            )
    bad = [check for check in checks if check.verdict != "ok"]
    return bad or checks[:1]


def judge_precision(machines: Sequence[Machine], *, precision: str | None) -> Check:
    """Judge the precision of the run by the measured speed of bf16 and fp32."""
    ratios = [machine.product_s["bf16"] / machine.product_s["fp32"] for machine in machines]
    ratio = max(ratios)
    worst = machines[ratios.index(ratio)]
    times = f"bf16 {1e3 * worst.product_s['bf16']:.3g} ms"
    times += f", fp32 {1e3 * worst.product_s['fp32']:.3g} ms for a small matrix product"
    times += f" on {worst.host}"
    if ratio > _SLOWER and precision != "fp32":
        text = f"bf16 is {ratio:.1f} times slower than fp32 here ({times}); engine.precision=fp32"
        return warning("precision", text) if precision else ok("precision", text + " is faster")
    return ok("precision", times)


def judge_speed(machines: Sequence[Machine]) -> list[Check]:
    """Find ranks whose device is slower than most: all others wait for it in every step."""
    allowed = _STRAGGLES["cpu" if machines[0].device is None else "cuda"]
    for name in machines[0].product_s:
        times = [machine.product_s[name] for machine in machines]
        usual = statistics.median_low(times)
        slow = [rank for rank, time_s in enumerate(times) if time_s > allowed * usual]
        if slow:
            said = (
                f"{ranks_text(slow, [machine.host for machine in machines])}: matrix products in"
                f" {name} take up to {max(times) / usual:.1f} times as long as on most ranks, and"
                " all wait for the slowest; check clocks, temperature and other programs there"
                " (nvidia-smi -q -d PERFORMANCE, top), or leave the node out"
            )
            return [warning("speed", said)]
    return []


def judge_open_files(machines: Sequence[Machine]) -> Check:
    """Judge the limit of open files on the node where all ranks meet."""
    first = machines[0]
    a_rank = _STORE_FILES + (0 if first.device else _GLOO_FILES)
    need, limit = _OWN_FILES + len(machines) * a_rank, first.open_files
    if limit != resource.RLIM_INFINITY and limit < need:
        return problem(
            "open files",
            f"{limit} are allowed on {first.host}, but {count_text(len(machines), 'rank')} that"
            f" meet there need about {need}; raise the limit (ulimit -n, limits.conf, docker:"
            " --ulimit nofile)",
        )
    return ok("open files", f"enough on {first.host} for the {count_text(len(machines), 'rank')}")


def judge_sharing(machines: Sequence[Machine], config: RunConfig | None) -> list[Check]:
    """Find accelerators that refuse a second process, if the run starts one on them."""
    alone = [
        r for r, machine in enumerate(machines) if machine.device and machine.device.one_process
    ]
    if not alone or config is None or config.train.micro_batch_size != "auto":
        return []
    return [
        problem(
            "devices",
            f"the GPU of {ranks_text(alone, [machine.host for machine in machines])} serves one"
            " process at a time (EXCLUSIVE_PROCESS), and train.micro_batch_size=auto starts a"
            " second one; set a number, or have the mode set to DEFAULT (nvidia-smi -c 0)",
        )
    ]


def judge_shared_memory(machines: Sequence[Machine], config: RunConfig | None) -> Check:
    """Judge the space in /dev/shm, through which data workers pass their batches."""
    free_bytes = [machine.shared_free_bytes for machine in machines]
    known = [free for free in free_bytes if free is not None]
    if not known:
        return ok("shared memory", f"{SHARED_MEMORY} does not exist here")
    least = min(known)
    host = machines[free_bytes.index(least)].host
    here = sum(machine.host == host for machine in machines)
    need = here * _worker_bytes(config, ranks=len(machines)) if config else _SMALL_SHARED_BYTES
    if least < need:
        return warning(
            "shared memory",
            f"{size_text(least)} free in {SHARED_MEMORY} of {host}, data workers may need"
            f" {size_text(need)}; raise it (docker: --shm-size), or set data.num_workers=0",
        )
    return ok("shared memory", f"{size_text(least)} free in {SHARED_MEMORY}")


def _worker_bytes(config: RunConfig, *, ranks: int) -> int:
    """Bytes of the batches that one rank's workers hold: two ready and one in progress, uint8."""
    train, largest = config.train, config.of_largest_size
    if train.micro_batch_size == "auto":
        size = max(1, train.batch_size // ranks)  # at most
    else:
        size = train.micro_batch_size
    batch = min(size, train.batch_size) * largest.pixels_per_image * config.data.channels
    return 3 * config.data.num_workers * batch
