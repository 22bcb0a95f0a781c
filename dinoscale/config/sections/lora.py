"""Settings of adapters, and what training a part of the weights goes with.

Source: Hu et al. 2021 (arXiv:2106.09685); [D] ours.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from dinoscale.config.sections.fields import CountOrZero, Positive, Section
from dinoscale.errors import ConfigError


class LoraConfig(Section):
    """Low-rank adapters train in place of the backbone, whose own weights stay as they began.

    With them train the heads and the mask token. Exported weights have the adapters merged in.
    """

    rank: CountOrZero = Field(
        default=0,
        description="Rank of the adapter beside each matrix of each block (qkv, proj and those of "
        "the MLP); 0: no adapters, and everything trains. 4 to 16 are common. [D].",
    )
    alpha: Positive = Field(
        default=16.0,
        description="The adapters are multiplied by alpha / rank. Their learning rate is the "
        "backbone's. Source: Hu et al. 2021, section 4.1; the value [D].",
    )
    norms: bool = Field(
        default=False, description="Whether the norms of the backbone train, too. [D]."
    )
    patch_embed: bool = Field(
        default=False,
        description="Whether the patch projection trains, too, for pixels of another kind. [D].",
    )

    @model_validator(mode="after")
    def _more_than_adapters_needs_some(self) -> "LoraConfig":
        for key in ("norms", "patch_embed"):
            if getattr(self, key) and not self.rank:
                raise ValueError(f"{key}: is of adapters, need false with lora.rank=0, got true")
        return self

    @property
    def scale(self) -> float:
        """What the adapters are multiplied by."""
        return self.alpha / max(self.rank, 1)

    def require_scale_of(self, checkpoint: Path, saved: Mapping[str, Any]) -> None:
        """Refuse to multiply trained adapters by another number than in their training.

        Args:
            checkpoint: that they are read from.
            saved: its settings by section; those of an older version have none of adapters.

        Raises:
            ConfigError: alpha differs. Other ranks have other tensors, compared elsewhere.
        """
        then = saved.get("lora", {})
        if self.rank and then.get("rank") == self.rank and then["alpha"] != self.alpha:
            raise ConfigError(
                f"lora.alpha: the adapters in {checkpoint} were trained with {then['alpha']}, and "
                f"{self.alpha} would multiply what they have learnt by "
                f"{self.alpha / then['alpha']:.4g}; set lora.alpha={then['alpha']}, or begin a new "
                f"run with new adapters and train.init_from={checkpoint}"
            )

    def mistakes(
        self,
        *,
        trained_blocks: int | None,
        begins_random: bool,
        has_blocks: bool,
        has_gram: bool,
        zero_stage: int,
    ) -> list[str]:
        """What training a part of the backbone does not go with.

        Args:
            trained_blocks: of `optim`.
            begins_random: whether the run begins with random weights.
            has_blocks: whether the backbone has transformer blocks.
            has_gram: whether there is a Gram loss.
            zero_stage: of the engine.
        """
        if not self.rank and trained_blocks is None:
            return []
        setting = (
            f"lora.rank={self.rank}" if self.rank else f"optim.trained_blocks={trained_blocks}"
        )
        key, off = ("lora.rank", "0") if self.rank else ("optim.trained_blocks", "null")
        mistakes = []
        if self.rank and trained_blocks is not None:
            mistakes.append(
                f"optim.trained_blocks: blocks do not train with {setting}, their adapters do; set "
                "one of them"
            )
        if not has_blocks:
            mistakes.append(f"{key}: the backbone has no transformer blocks, need {off}")
        if begins_random:
            mistakes.append(
                f"{key}: the run begins with random weights, most of which would stay random; give "
                f"train.init_from or train.continue_from, or set {key}={off}"
            )
        if has_gram:
            mistakes.append(
                f"gram.loss_weight: a Gram network has all weights of its own, and with {setting} "
                "most are shared; need 0.0. anchor.* keeps features near the start's"
            )
        if zero_stage == 3:
            mistakes.append(
                f"engine.zero_stage: at stage 3 weights that do not train stay gathered once the "
                f"backward has recomputed with them (DeepSpeed #8148); with {setting} need 0, 1 or "
                "2, got 3"
            )
        return mistakes
