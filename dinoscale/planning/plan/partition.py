"""How a run is partitioned over ranks, and the types it stores."""

from dataclasses import dataclass

from dinoscale.config import RunConfig, RunPlan
from dinoscale.engine.param_groups import MOMENTS
from dinoscale.models.activation_checkpointing import Recompute

FP32 = 4  # bytes


@dataclass(frozen=True)
class Setup:
    """The settings that memory, time and communication depend on, besides the sizes.

    Attributes:
        zero_stage: 0-3.
        world_size: W, the number of ranks.
        micro_batch_size: images of a rank in one pass.
        accumulation_steps: passes per step.
        bf16: weights and activations in bfloat16, else float32.
        communication_bytes: c, bytes of a number that is reduced over ranks.
        checkpoint_every: every k-th block is recomputed; 0 for none.
        recompute: the part of such a block that is recomputed.
        moments: tensors per weight that the optimizer keeps.
        offload_optimizer: whether master weights, moments and EMA are in host memory.
        reduce_bucket_size: size of DeepSpeed's gradient buckets.
        stage3_max_live_parameters: weights that stage 3 keeps gathered.
        zero_hpz_partition_size: ranks of a node that share a second copy of the weights at stage 3;
            1 for none.
        on_gpu: on a GPU, where collectives need no copies of their own.
        compiled: whether blocks are compiled; they keep what autograd keeps.
    """

    zero_stage: int
    world_size: int
    micro_batch_size: int
    accumulation_steps: int
    bf16: bool
    communication_bytes: int
    checkpoint_every: int
    recompute: Recompute
    moments: int
    offload_optimizer: bool
    reduce_bucket_size: int
    stage3_max_live_parameters: int
    zero_hpz_partition_size: int
    on_gpu: bool
    compiled: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in the forward."""
        return 2 if self.bf16 else FP32

    @property
    def sums_in_fp32(self) -> bool:
        """Whether a rank accumulates its bf16 gradients in float32, see ds_config.py."""
        summed = self.accumulation_steps > 1 or self.world_size > 1
        return self.bf16 and self.zero_stage >= 2 and summed


def setup_of(config: RunConfig, run: RunPlan, *, on_gpu: bool) -> Setup:
    """The setup of a run."""
    engine = config.engine
    of_sums = engine.communication_dtype if run.world_size > 1 else engine.precision
    return Setup(
        zero_stage=engine.zero_stage,
        world_size=run.world_size,
        micro_batch_size=run.micro_batch_size,
        accumulation_steps=run.accumulation_steps,
        bf16=engine.precision == "bf16",
        communication_bytes=2 if of_sums == "bf16" else FP32,
        checkpoint_every=engine.checkpoint_every_k_blocks,
        recompute=engine.recompute,
        moments=len(MOMENTS[config.optim.name]),
        offload_optimizer=engine.offload_optimizer,
        reduce_bucket_size=engine.reduce_bucket_size,
        stage3_max_live_parameters=engine.stage3_max_live_parameters,
        zero_hpz_partition_size=engine.zero_hpz_partition_size,
        on_gpu=on_gpu,
        compiled=engine.compile is True or (engine.compile == "auto" and on_gpu),
    )
