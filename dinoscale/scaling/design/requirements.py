"""Memory and time of one run of a sweep, by the model of `dinoscale plan`."""

from __future__ import annotations

from dataclasses import dataclass

from dinoscale.config import micro_batch_sizes, resolve, split_batch, without_auto
from dinoscale.config.sweep.executor import ExecutorConfig
from dinoscale.config.sweep.file import CostConfig
from dinoscale.errors import ConfigError
from dinoscale.planning.plan import strategies
from dinoscale.planning.plan.communication import Links
from dinoscale.planning.plan.hardware import GPUS, NETWORK, Gpu, find_gpu, parse_bytes
from dinoscale.planning.plan.memory_model import peak
from dinoscale.planning.plan.partition import Setup, setup_of
from dinoscale.planning.plan.strategies import Machine
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.design.resolved_run import dims_of_run


@dataclass(frozen=True)
class Need:
    """What a run asks of each rank.

    Attributes:
        micro_batch_size: images of a rank in one pass; None where it is found at the start.
        memory_bytes: at the fullest moment, of a GPU with all that is not tensors; None where the
            micro-batch is.
        hours: of its steps; None where nothing says how fast a rank is.
        trouble: why it cannot run, in words; empty where it can.
    """

    micro_batch_size: int | None
    memory_bytes: int | None
    hours: float | None
    trouble: str = ""


def require_known(cost: CostConfig) -> None:
    """Refuse a GPU that is not in the table, and a size of memory that is none.

    Raises:
        ConfigError: it is so.
    """
    if cost.gpu is not None and cost.gpu.lower() not in GPUS:
        raise ConfigError(f"cost.gpu: {cost.gpu!r} is not known; known are {', '.join(GPUS)}")
    if cost.gpu_memory is not None:
        parse_bytes(cost.gpu_memory, option="cost.gpu_memory")


def need_of(run: PlannedRun, cost: CostConfig, executor: ExecutorConfig) -> Need:
    """Work out one run; `cost` has passed `require_known`."""
    config, ranks = run.config, executor.nodes * executor.processes
    num_images = max(run.images, config.data.subset_size or 0)  # any that is enough
    steps = resolve(without_auto(config), world_size=ranks, num_images=num_images)
    setup = setup_of(config, steps, on_gpu=cost.gpu is not None)
    if cost.gpu is not None:
        machine = _machine(find_gpu(cost.gpu), setup, cost, node_gpus=executor.processes)
        return _on_gpu(run, setup, machine, name=cost.gpu.lower())
    hours = None
    if cost.flops_per_s is not None:
        hours = run.flops / cost.flops_per_s / ranks / 3600
    if config.train.micro_batch_size == "auto":
        return Need(None, None, hours)
    return Need(setup.micro_batch_size, round(peak(dims_of_run(config), setup).total), hours)


def _machine(gpu: Gpu, setup: Setup, cost: CostConfig, *, node_gpus: int) -> Machine:
    memory = gpu.memory_bytes
    if cost.gpu_memory is not None:
        memory = parse_bytes(cost.gpu_memory, option="cost.gpu_memory")
    return Machine(
        flops=gpu.bf16_flops if setup.bf16 else gpu.fp32_flops,
        utilization=cost.utilization,
        memory_bytes=memory,
        links=Links(node=node_gpus, within=gpu.link_bandwidth, between=NETWORK),
    )


def _on_gpu(run: PlannedRun, setup: Setup, machine: Machine, *, name: str) -> Need:
    """With the configured micro-batch; where it is auto with the largest that fits."""
    dims, train = dims_of_run(run.config), run.config.train
    sizes = micro_batch_sizes(train, world_size=setup.world_size)
    if train.micro_batch_size == "auto":
        option = strategies.largest(dims, setup, machine, sizes)
    else:
        split = split_batch(train, world_size=setup.world_size)
        option = strategies.option_of(
            dims,
            strategies.with_micro_batch(setup, split.micro_batch_size, share=sizes[-1]),
            machine,
        )
    trouble = ""
    if not option.fits:
        best = strategies.best(
            dims, strategies.options(dims, setup, machine, sizes), stage=setup.zero_stage
        )
        trouble = (
            f"needs {option.needed_bytes / 1e9:.4g} GB with a micro-batch of"
            f" {option.setup.micro_batch_size}, a {name} has {machine.memory_bytes / 1e9:.4g} GB;"
            f" {_remedy(best)}"
        )
    return Need(
        micro_batch_size=option.setup.micro_batch_size,
        memory_bytes=round(option.needed_bytes),
        hours=run.steps * option.step_s / 3600,
        trouble=trouble,
    )


def _remedy(best: strategies.Option | None) -> str:
    if best is None:
        return "nothing fits: take a larger GPU or more processes for a run, or a smaller model"
    setup = best.setup
    level = f", engine.recompute: {best.level}" if setup.checkpoint_every else ""
    return (
        f"set train.micro_batch_size: {setup.micro_batch_size}, engine.zero_stage:"
        f" {setup.zero_stage}, engine.checkpoint_every_k_blocks: {setup.checkpoint_every}{level}"
    )
