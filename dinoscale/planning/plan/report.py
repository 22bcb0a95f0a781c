"""The plan of a configuration on given GPUs, as JSON-able numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from dinoscale.config import (
    RunConfig,
    RunPlan,
    micro_batch_sizes,
    require_groups_within_nodes,
    resolve,
    split_batch,
    without_auto,
)
from dinoscale.data.sources.mixture import source_sizes
from dinoscale.engine.model_sizes import Dims, dims_of, flops_of
from dinoscale.errors import ConfigError, DataError
from dinoscale.planning.plan import strategies
from dinoscale.planning.plan.communication import Links
from dinoscale.planning.plan.failures import (
    DEFAULT_RESTART,
    FAILURES_PER_GPU_DAY,
    Restart,
    durability,
)
from dinoscale.planning.plan.hardware import NETWORK, find_gpu, parse_bytes
from dinoscale.planning.plan.memory_model import PARTS
from dinoscale.planning.plan.offload import HOST_MEMORY, PCIE
from dinoscale.planning.plan.partition import Setup, setup_of
from dinoscale.planning.plan.strategies import Machine, Option
from dinoscale.training.feed import open_images

IMAGENET = 1_281_167  # training images of ImageNet-1k


def make_plan(
    config: RunConfig,
    *,
    gpus: int,
    gpu: str,
    gpu_memory: str | None,
    utilization: float,
    network: float | None,
    node_gpus: int,
    storage: float,
    restart: Restart = DEFAULT_RESTART,
) -> dict[str, Any]:
    """Predict what a run needs; builds the network's shapes only.

    Args:
        config: of the run.
        gpus: number of ranks.
        gpu: name of the GPU.
        gpu_memory: memory of one GPU, such as "80GB"; None for the published size.
        utilization: share of a GPU's published FLOP/s that the model's own FLOPs reach.
        network: GB/s that one GPU sends to other nodes, or to the others of the only node; None
            for the default.
        node_gpus: ranks per node.
        storage: GB/s that all ranks together write to and read from run_dir.
        restart: costs of a failure besides the lost steps.

    Returns:
        JSON-able: parameters, FLOPs, one entry for each stage and level, the configured and the
        recommended setup, and the assumptions as sentences.

    Raises:
        ConfigError: a number is out of range, the batch does not divide over the ranks, or the
            backbone is not a ViT.
    """
    _check(
        gpus=gpus, utilization=utilization, network=network, node_gpus=node_gpus, storage=storage
    )
    for option, seconds in asdict(restart).items():
        if not 0 <= seconds < float("inf"):
            raise ConfigError(f"--{option.removesuffix('_s')}: need seconds, got {seconds}")
    require_groups_within_nodes(config, ranks_of_node=min(gpus, node_gpus))
    found = find_gpu(gpu)
    memory = parse_bytes(gpu_memory, option="--gpu-memory") if gpu_memory else found.memory_bytes
    within = gpus <= node_gpus
    links = Links(
        node=node_gpus,
        within=network * 1e9 if network and within else found.link_bandwidth,
        between=network * 1e9 if network else NETWORK,
    )
    dims = dims_of(config)
    sizes = micro_batch_sizes(config, world_size=gpus)
    run, assumed = _in_steps(config, gpus=gpus)
    setup = setup_of(config, run, on_gpu=True)
    machine = Machine(
        flops=found.bf16_flops if setup.bf16 else found.fp32_flops,
        utilization=utilization,
        memory_bytes=memory,
        links=links,
    )
    options = strategies.options(dims, setup, machine, sizes)
    chosen = strategies.best(dims, options, stage=config.engine.zero_stage)
    return {
        "backbone": config.model.backbone,
        "precision": config.engine.precision,
        "gpus": gpus,
        "gpu": gpu.lower(),
        "gpu_memory_bytes": memory,
        "gpu_flops": machine.flops,
        "utilization": utilization,
        "node_gpus": node_gpus,
        "send_bytes_per_s": links.within if within else links.between,
        "images_per_step": run.batch_size,
        "steps_per_epoch": run.steps_per_epoch,
        "steps": run.stop_step,
        "parameters": {
            "backbone": dims.backbone,
            "head": dims.head,
            "total": dims.parameters,
            "trained": dims.trained,
            "frozen_teacher": sum(
                teacher.parameters for teacher in (dims.frozen_teacher, dims.followed) if teacher
            ),
        },
        "sizes": _sizes(config, dims),
        "flops_per_image": _flops(dims),
        "options": [_as_json(option, run, links) for option in options],
        "configured": _configured(config, dims, setup, machine, run),
        "recommended": None if chosen is None else _as_json(chosen, run, links),
        "durability": asdict(durability(dims, setup, storage=storage * 1e9, restart=restart)),
        "assumptions": [
            *assumed,
            *_assumptions(config, machine, given=network is not None, within=within),
            *([] if within else _assumptions_of_many_nodes(links, storage, restart)),
        ],
    }


def plan_of_phases(plans: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The plans of a run's phases by name, and their hours together, as JSON-able numbers.

    The hours are those of the recommended setups; None if nothing fits one of the phases.
    """
    best = [plan["recommended"] for plan in plans.values()]
    hours = None if None in best else round(sum(option["hours"] for option in best), 2)
    return {"phases": dict(plans), "hours": hours}


def _check(
    *, gpus: int, utilization: float, network: float | None, node_gpus: int, storage: float
) -> None:
    for option, count in (("--gpus", gpus), ("--node-gpus", node_gpus)):
        if count < 1:
            raise ConfigError(f"{option}: need at least 1, got {count}")
    if not 0 < utilization <= 1:
        raise ConfigError(f"--utilization: need more than 0 and at most 1, got {utilization}")
    for option, speed in (("--network", network), ("--storage", storage)):
        if speed is not None and not 0 < speed < float("inf"):
            raise ConfigError(f"{option}: need GB/s above 0, got {speed}")


def _in_steps(config: RunConfig, *, gpus: int) -> tuple[RunPlan, list[str]]:
    """The run in steps, and the assumptions this needed."""
    images, assumed = _num_images(config)
    return resolve(without_auto(config), world_size=gpus, num_images=images), assumed


def _num_images(config: RunConfig) -> tuple[int | Sequence[int], list[str]]:
    why = "data.train is not set"
    if config.data.sources:
        try:
            return source_sizes(open_images(config)), []
        except DataError as error:
            why = f"data.train cannot be opened here ({error})"
    wanted = config.data.subset_size or config.data.images_per_epoch
    if wanted:
        return wanted, []
    return IMAGENET, [f"{IMAGENET:,} images, as in ImageNet-1k: {why}"]


def _configured(
    config: RunConfig, dims: Dims, setup: Setup, machine: Machine, run: RunPlan
) -> dict[str, Any] | None:
    """The setup as configured; None if the run searches its micro-batch at the start (auto).

    Raises:
        ConfigError: the micro-batch does not divide a rank's images of a step.
    """
    if config.train.micro_batch_size == "auto":
        return None
    split = split_batch(config, world_size=setup.world_size)
    configured = replace(
        setup,
        micro_batch_size=split.micro_batch_size,
        accumulation_steps=split.accumulation_steps,
    )
    return _as_json(strategies.option_of(dims, configured, machine), run, machine.links)


def _sizes(config: RunConfig, dims: Dims) -> list[dict[str, Any]]:
    """Share of the steps, sides of the crops in words and FLOPs per image of each size."""
    return [
        {
            "weight": share,
            "sizes": run.sizes_text,
            "flops_per_image": flops_of(part).total,
            "largest": part == replace(dims, mixture=()),
        }
        for run, (share, part) in zip(config.of_sizes, dims.of_sizes, strict=True)
    ]


def _flops(dims: Dims) -> dict[str, int]:
    flops = flops_of(dims)
    return {**asdict(flops), "total": flops.total}


def _as_json(option: Option, run: RunPlan, links: Links) -> dict[str, Any]:
    setup = option.setup
    found = [asdict(t) | {"between_bytes": links.between_bytes(t)} for t in option.transfers]
    return {
        "zero_stage": setup.zero_stage,
        "recompute": option.level,
        "checkpoint_every_k_blocks": setup.checkpoint_every,
        "micro_batch_size": setup.micro_batch_size,
        "accumulation_steps": setup.accumulation_steps,
        "fits": option.fits,
        "needed_bytes": round(option.needed_bytes),
        "peak_bytes": round(option.peak.total),
        "peak_moment": option.peak.moment,
        "bytes": {part: round(option.peak.terms[part]) for part in PARTS},
        "images_per_s": round(option.images_per_s, 1),
        "step_s": max(round(option.step_s, 6), 1e-6),  # less of tiny networks
        "offload_s": round(option.offload_s, 6),
        "hours": round(run.stop_step * option.step_s / 3600, 2),
        "communication": {
            "sent_bytes": round(sum(t.sent_bytes for t in option.transfers)),
            "between_bytes": round(sum(transfer["between_bytes"] for transfer in found)),
            "seconds": round(option.transfer_s, 6),
            "waited_s": round(option.waited_s, 6),
            "transfers": found,
        },
    }


def _assumptions(config: RunConfig, machine: Machine, *, given: bool, within: bool) -> list[str]:
    sentences = [
        f"the model's own FLOPs reach {machine.utilization:.0%} of a GPU's published"
        f" {machine.flops / 1e12:.4g} TFLOP/s; the input keeps up",
        f"{strategies.CONTEXT_BYTES / 1e9:g} GB for CUDA and NCCL, and"
        f" {strategies.FRAGMENTATION:.0%} of the tensors' size for fragmentation: neither has been"
        " compared with a GPU's allocator",
        "blocks are compiled (engine.compile) and save all activations that autograd keeps"
        if config.engine.compile is not False
        else "blocks are not compiled (engine.compile), and make some activations again",
    ]
    if config.has_heads:
        sentences.append(
            "the prototypes are trained; the first steps, which freeze them, need less"
        )
    if config.model.drop_path_mode == "subset":
        sentences.append(
            "branches that stochastic depth drops take no time, but count in the GFLOPs per image"
            " and as saved"
        )
    if config.engine.offload_optimizer:
        sentences.append(
            f"with the optimizer offloaded, {PCIE / 1e9:g} GB/s between a GPU and host memory, and"
            f" {HOST_MEMORY / 1e9:g} GB/s of host memory for the update, while the GPU waits:"
            " estimates"
        )
    links = machine.links
    if not given:
        speed, where = links.between, f"between nodes of {links.node} GPUs"
        if within:
            speed, where = links.within, "within its node"
        sentences.append(f"a GPU sends {speed / 1e9:g} GB/s {where} (--network)")
    return sentences


def _assumptions_of_many_nodes(links: Links, storage: float, restart: Restart) -> list[str]:
    return [
        f"collectives use rings: 1 in {links.node} bytes that a GPU sends leaves its node, the"
        f" others go at {links.within / 1e9:g} GB/s; the latency of collectives, which grows with"
        " the number of ranks, is not counted",
        f"all ranks together write and read {storage:g} GB/s (--storage)",
        f"{FAILURES_PER_GPU_DAY * 1e3:.2f} failures per 1,000 GPU-days, as in Llama 3's training"
        " (arXiv:2407.21783)",
        f"a failure is noticed after at most {restart.hang_s:g} s (--hang); then"
        f" {restart.requeue_s:g} s until the nodes are available again (--requeue),"
        f" {restart.start_s:g} s until the ranks have met (--start), {restart.index_s:g} s to list"
        " the images (--index)",
    ]
