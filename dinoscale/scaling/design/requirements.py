"""Memory and time of one run of a sweep, estimated as in `dinoscale plan`."""

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
class Requirements:
    """What a run needs on each rank.

    Attributes:
        micro_batch_size: images per forward pass; None where the run finds it at its start.
        memory_bytes: peak memory; on a GPU it includes what is not tensors. None where the
            micro-batch size is.
        hours: duration of its steps; None where the speed of a rank is unknown.
        problem: why the run cannot work; empty where it can.
    """

    micro_batch_size: int | None
    memory_bytes: int | None
    hours: float | None
    problem: str = ""


def require_known_gpu(cost: CostConfig) -> None:
    """Refuse an unknown GPU or an invalid memory size.

    Raises:
        ConfigError: the GPU is not in the table, or the memory size cannot be parsed.
    """
    if cost.gpu is not None and cost.gpu.lower() not in GPUS:
        raise ConfigError(f"cost.gpu: {cost.gpu!r} is unknown; known are {', '.join(GPUS)}")
    if cost.gpu_memory is not None:
        parse_bytes(cost.gpu_memory, option="cost.gpu_memory")


def requirements_of(run: PlannedRun, cost: CostConfig, executor: ExecutorConfig) -> Requirements:
    """The requirements of one run; `cost` has passed `require_known_gpu`."""
    config, ranks = run.config, executor.nodes * executor.processes
    num_images = max(run.images, config.data.subset_size or 0)  # any sufficient number
    steps = resolve(without_auto(config), world_size=ranks, num_images=num_images)
    setup = setup_of(config, steps, on_gpu=cost.gpu is not None)
    if cost.gpu is not None:
        machine = _machine(find_gpu(cost.gpu), setup, cost, node_gpus=executor.processes)
        return _on_gpu(run, setup, machine, name=cost.gpu.lower())
    hours = None
    if cost.flops_per_s is not None:
        hours = run.flops / cost.flops_per_s / ranks / 3600
    if config.train.micro_batch_size == "auto":
        return Requirements(None, None, hours)
    return Requirements(
        setup.micro_batch_size, round(peak(dims_of_run(config), setup).total), hours
    )


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


def _on_gpu(run: PlannedRun, setup: Setup, machine: Machine, *, name: str) -> Requirements:
    """With the configured micro-batch size, or with the largest that fits if it is auto."""
    dims, config = dims_of_run(run.config), run.config
    sizes = micro_batch_sizes(config, world_size=setup.world_size)
    if config.train.micro_batch_size == "auto":
        option = strategies.largest(dims, setup, machine, sizes)
    else:
        split = split_batch(config, world_size=setup.world_size)
        option = strategies.option_of(
            dims,
            strategies.with_micro_batch(setup, split.micro_batch_size, share=sizes[-1]),
            machine,
        )
    problem = ""
    if not option.fits:
        best = strategies.best(
            dims, strategies.options(dims, setup, machine, sizes), stage=setup.zero_stage
        )
        problem = (
            f"needs {option.needed_bytes / 1e9:.4g} GB with a micro-batch of"
            f" {option.setup.micro_batch_size}, but a {name} has"
            f" {machine.memory_bytes / 1e9:.4g} GB; {_remedy(best)}"
        )
    return Requirements(
        micro_batch_size=option.setup.micro_batch_size,
        memory_bytes=round(option.needed_bytes),
        hours=run.steps * option.step_s / 3600,
        problem=problem,
    )


def _remedy(best: strategies.Option | None) -> str:
    if best is None:
        return "nothing fits: choose a larger GPU, more processes per run, or a smaller model"
    setup = best.setup
    level = f", engine.recompute: {best.level}" if setup.checkpoint_every else ""
    return (
        f"set train.micro_batch_size: {setup.micro_batch_size}, engine.zero_stage:"
        f" {setup.zero_stage}, engine.checkpoint_every_k_blocks: {setup.checkpoint_every}{level}"
    )
