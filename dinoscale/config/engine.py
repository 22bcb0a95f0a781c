"""Settings of the engine.

[D] ours, with the reason.
"""

from typing import Literal

from pydantic import Field, model_validator

from dinoscale.config.fields import CountOrZero, Section


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
        description="What of such a block is recomputed; pointwise: norms, activations and sums.",
    )
    compile: Literal["auto", True, False] = Field(
        default="auto",
        description="Compile the transformer blocks, which takes a minute; auto: on a GPU only.",
    )
    offload_optimizer: bool = Field(
        default=False, description="Keep the optimizer state in CPU memory."
    )
    communication_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Type in which gradients are summed over ranks."
    )

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
