"""Memory-saving strategies for a configuration on given GPUs, and the recommended one."""

from dataclasses import dataclass, replace
from typing import Literal

from dinoscale.engine.flops import StepFlops
from dinoscale.engine.model_sizes import Dims, flops_of
from dinoscale.models.activation_checkpointing import Recompute
from dinoscale.planning.plan.communication import Links, Transfer, transfers, waited_s
from dinoscale.planning.plan.dropped_branches import dropped_flops, dropped_forward_flops
from dinoscale.planning.plan.memory_model import Peak, peak
from dinoscale.planning.plan.offload import offload_s
from dinoscale.planning.plan.partition import Setup

# Conservative assumptions, not compared with a GPU's allocator.
CONTEXT_BYTES = 1.5e9  # CUDA, cuBLAS and NCCL of one process
FRAGMENTATION = 0.1  # of the tensors' bytes, lost between blocks of the allocator
# An estimate, tokens times width of a pass, 16384 tokens of a ViT-L: with fewer, a GPU waits for
# kernel launches.
BUSY_SCALARS = 16384 * 1024

Level = Literal["none"] | Recompute
LEVELS: tuple[Level, ...] = ("none", "pointwise", "all_but_attention", "block")
STAGES = (2, 1, 0, 3)  # by preference: 2 accumulates in float32, 3 sends the most


@dataclass(frozen=True)
class Machine:
    """The GPUs to run on.

    Attributes:
        flops: FLOP/s of one GPU at the run's precision, as published.
        utilization: share of them that the model's own FLOPs reach.
        memory_bytes: memory of one GPU.
        links: between the GPUs.
    """

    flops: float
    utilization: float
    memory_bytes: float
    links: Links


@dataclass(frozen=True)
class Option:
    """One way to run: its memory, and its seconds per step.

    Attributes:
        level: what the backward recomputes.
        setup: of the run.
        peak: memory of a rank's tensors.
        needed_bytes: memory of a GPU, with CUDA context and fragmentation.
        fits: whether a GPU has that much.
        transfers: of a step.
        compute_s: seconds of compute, on average over the sizes of a mixture.
        transfer_s: seconds of all transfers.
        waited_s: seconds that a step waits for transfers.
        offload_s: seconds that a step waits for the offloaded optimizer.
    """

    level: Level
    setup: Setup
    peak: Peak
    needed_bytes: float
    fits: bool
    transfers: list[Transfer]
    compute_s: float
    transfer_s: float
    waited_s: float
    offload_s: float

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.compute_s + self.waited_s + self.offload_s

    @property
    def images_per_s(self) -> float:
        """Images per second of all GPUs together."""
        setup = self.setup
        images = setup.micro_batch_size * setup.accumulation_steps * setup.world_size
        return images / self.step_s


def option_of(dims: Dims, setup: Setup, machine: Machine) -> Option:
    """Memory and time of one setup."""
    at_peak = peak(dims, setup)
    needed = at_peak.total * (1 + FRAGMENTATION) + CONTEXT_BYTES
    found = transfers(dims, setup)
    images = setup.micro_batch_size * setup.accumulation_steps
    compute_s = waits_s = 0.0
    for share, part in dims.of_sizes:
        flops = flops_of(part)
        dropped = dropped_flops(part, micro_batch_size=setup.micro_batch_size)
        work = images * (flops.total - dropped + recomputed_flops(part, setup, flops))
        part_s = work / (machine.flops * machine.utilization)
        compute_s += share * part_s
        waits_s += share * waited_s(found, machine.links, compute_s=part_s)
    return Option(
        level=setup.recompute if setup.checkpoint_every else "none",
        setup=setup,
        peak=at_peak,
        needed_bytes=needed,
        fits=needed <= machine.memory_bytes,
        transfers=found,
        compute_s=compute_s,
        transfer_s=sum(machine.links.seconds(t) for t in found),
        waited_s=waits_s,
        offload_s=offload_s(dims, setup),
    )


def recomputed_flops(dims: Dims, setup: Setup, flops: StepFlops) -> float:
    """FLOPs per image that recomputation adds; saved products are not recomputed."""
    if not setup.checkpoint_every or setup.recompute == "pointwise":
        return 0
    attention = setup.recompute != "all_but_attention"
    work: float = 2 * dims.tokens * dims.block_matrices * dims.depth  # the linear layers
    if attention:  # patch embedding included, which is small
        work = flops.student_global + flops.student_local
    work -= dropped_forward_flops(
        dims, micro_batch_size=setup.micro_batch_size, attention=attention
    )
    every, first = setup.checkpoint_every, dims.first_backward
    recomputed = len(range(0, dims.depth, every)) - len(range(0, first, every))
    return recomputed / dims.depth * work


def options(dims: Dims, setup: Setup, machine: Machine, sizes: list[int]) -> list[Option]:
    """Every stage at every level, each with the largest micro-batch that fits, or the smallest.

    Args:
        dims: of the network.
        setup: of the run; its stage, recomputation and micro-batch are varied.
        machine: to run on.
        sizes: micro-batches that divide a rank's images of a step, ascending.
    """
    found = []
    for stage in sorted(STAGES):
        if setup.offload_optimizer and stage == 0:
            continue  # stage 0 has no shard to offload
        if dims.frozen and stage == 3:
            continue  # refused, see `LoraConfig.mistakes`
        for level in LEVELS:
            if level == "pointwise" and not setup.compiled:
                continue  # eager blocks do that anyway
            tried = replace(
                setup,
                zero_stage=stage,
                checkpoint_every=0 if level == "none" else 1,
                recompute="block" if level == "none" else level,
            )
            found.append(largest(dims, tried, machine, sizes))
    return found


def largest(dims: Dims, setup: Setup, machine: Machine, sizes: list[int]) -> Option:
    """The setup with the largest of these micro-batches (ascending) that fits, or the smallest."""
    smallest = option_of(dims, with_micro_batch(setup, sizes[0], share=sizes[-1]), machine)
    for size in reversed(sizes):
        option = option_of(dims, with_micro_batch(setup, size, share=sizes[-1]), machine)
        if option.fits:
            return option
    return smallest


def with_micro_batch(setup: Setup, size: int, *, share: int) -> Setup:
    """The setup with this micro-batch; `share` counts the images of a rank in a step."""
    return replace(setup, micro_batch_size=size, accumulation_steps=share // size)


def best(dims: Dims, found: list[Option], *, stage: int) -> Option | None:
    """The cheapest option that fits, or None.

    In order of priority: enough numbers in a layer to keep a GPU busy, the least recomputation, a
    stage of at most 2 (the configured one first), the largest micro-batch.
    """
    stages = [stage, *STAGES] if stage < STAGES[-1] else list(STAGES)
    fitting = [option for option in found if option.fits]
    of_image = dims.mean_tokens * dims.embed_dim
    most = max((of_image * option.setup.micro_batch_size for option in fitting), default=0)
    return min(
        fitting,
        key=lambda option: (
            of_image * option.setup.micro_batch_size < min(BUSY_SCALARS, most),
            LEVELS.index(option.level),
            stages.index(option.setup.zero_stage),
            -option.setup.micro_batch_size,
        ),
        default=None,
    )
