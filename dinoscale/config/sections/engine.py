"""Settings of the engine: how DeepSpeed shards, computes and communicates.

[D] ours, with the reason.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from dinoscale.config.sections.fields import Count, CountOrZero, Section

# Settings of DeepSpeed that a run must not use, with the reason.
_REFUSED = {
    "overlap_comm": "not offered: DeepSpeed then sums gradients on a second stream, and results"
    " have been compared on CPUs only, which have none",
    "mics_shard_size": "DeepSpeed has removed MiCS; engine.zero_hpz_partition_size keeps the"
    " gathers of the backward within a node",
    "zero_quantized_weights": "not offered: weights rounded to 8 bit give other numbers",
    "zero_quantized_gradients": "not offered: gradients rounded to 4 bit give other numbers;"
    " engine.communication_dtype=bf16 halves their bytes",
}


class EngineConfig(Section):
    """How DeepSpeed runs the student. Source: [D]; none of it is part of the recipe."""

    zero_stage: int = Field(
        default=2,
        ge=0,
        le=3,
        description="What is sharded over ranks: 1 optimizer, 2 + gradients, 3 + weights.",
    )
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Type of weights and activations; the master weights are fp32."
    )
    checkpoint_every_k_blocks: CountOrZero = Field(
        default=0, description="Recompute every k-th block in the backward pass; 1 all, 0 none."
    )
    recompute: Literal["pointwise", "all_but_attention", "block"] = Field(
        default="block",
        description="What such a block recomputes; pointwise: norms and activations, as blocks that"
        " are not compiled always do.",
    )
    compile: Literal["auto", True, False] = Field(
        default="auto",
        description="torch.compile the transformer blocks, which takes a minute, and on a GPU the"
        " color augmentation; auto: on a GPU only.",
    )
    offload_optimizer: bool = Field(
        default=False, description="Keep the optimizer state in CPU memory."
    )
    communication_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Type in which gradients are summed over ranks. bf16 halves what is sent and"
        " rounds every sum to 8 bits: for slow networks.",
    )
    reduce_bucket_size: Count = Field(
        default=2**24,
        description="Gradient elements that are summed over ranks at once, about 8 bytes each. More"
        " for many ranks or a slow network, where each sum costs a delay.",
    )
    stage3_max_live_parameters: Count = Field(
        default=50_000_000,
        description="Stage 3: most weights that are gathered at a time; at most half of them are"
        " prefetched. At least two blocks of the backbone, else compute waits for every block.",
    )
    zero_hpz_partition_size: Count = Field(
        default=1,
        description="Stage 3 on several nodes: ranks of a node that share a second copy of the"
        " weights, so that only the first gather of a step leaves the node (hpZ of ZeRO++,"
        " arXiv:2306.10209); 1: no copy. For slow networks; it takes memory.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_with_a_reason(cls, values: object) -> object:
        for key in _REFUSED.keys() & (values.keys() if isinstance(values, Mapping) else ()):
            raise ValueError(f"{key}: {_REFUSED[key]}")
        return values

    @model_validator(mode="after")
    def _recompute_needs_blocks(self) -> "EngineConfig":
        if self.recompute != "block" and self.checkpoint_every_k_blocks == 0:
            raise ValueError(
                f"recompute: {self.recompute!r} says what checkpointed blocks recompute, but there"
                " are none; set engine.checkpoint_every_k_blocks=1"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_a_shard(self) -> "EngineConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer: needs engine.zero_stage 1, 2 or 3, got 0")
        return self

    @model_validator(mode="after")
    def _second_copy_needs_stage_3(self) -> "EngineConfig":
        if self.zero_hpz_partition_size > 1 and self.zero_stage != 3:
            raise ValueError(
                f"zero_hpz_partition_size: needs engine.zero_stage 3, got {self.zero_stage}; at"
                " lower stages every rank has all weights"
            )
        return self
