"""Settings of the training itself: optimizer, schedules, length.

Sources: [C] code of Caron et al. 2021 (arXiv:2104.14294), its command-line defaults; Simeoni et al.
2025 (arXiv:2508.10104) and its code for curves; [D] ours.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dinoscale.config.sections.fields import (
    BetaPair,
    Count,
    CountOrAuto,
    CountOrZero,
    Fraction,
    PathText,
    Positive,
    PositiveOrZero,
    Section,
)


class OptimConfig(Section):
    """The optimizer and its schedules, unless `schedules` has curves for them."""

    name: Literal["adamw", "sgd"] = Field(
        default="adamw", description="adamw; sgd: momentum 0.9. Source: [C]."
    )
    betas: BetaPair = Field(
        default=(0.9, 0.999), description="Averages of AdamW's two moments. Source: [C]."
    )
    lr: Positive = Field(
        default=5e-4,
        description="Peak learning rate of a step of 256 images, of 1024 with lr_scaling sqrt, of "
        "64 with sqrt_64. Source: [C].",
    )
    lr_scaling: Literal["linear", "sqrt", "sqrt_64"] = Field(
        default="linear",
        description="How the peak rate, or peak and end of schedules.lr, grow with the images of a "
        "step. linear: lr x batch / 256. Source: [C]. sqrt: lr x sqrt(batch / 1024), as DINOv2 "
        "does. sqrt_64: lr x sqrt(batch / 64), which is DINOv3's lr x 4 sqrt(batch / 1024).",
    )
    layer_decay: Fraction = Field(
        default=1.0,
        gt=0,
        description="Factor of the learning rate from each block to the one before; the embeddings "
        "come first, heads and final norm have the full rate. Source: DINOv2.",
    )
    patch_embed_lr: PositiveOrZero = Field(
        default=1.0,
        description="Further factor of the learning rate of the patch projection. 0.2 in DINOv2.",
    )
    backbone_lr: PositiveOrZero = Field(
        default=1.0,
        description="Further factor of the learning rate of all other weights of the backbone. 0: "
        "they rest, decay included, while new heads learn; AdamW's moments follow the gradients.",
    )
    trained_blocks: Count | None = Field(
        default=None,
        description="Only the last so many blocks train, with the final norm, the mask token and "
        "the heads; the rest of the backbone stays as it began. With a patch loss (ibot) gradients "
        "pass all blocks on the way to the mask token, and frozen ones keep their activations, "
        "too. null: all of it trains. [D].",
    )
    min_lr: PositiveOrZero = Field(
        default=1e-6, description="Final learning rate, not scaled with the batch. Source: [C]."
    )
    warmup_epochs: CountOrZero = Field(
        default=10, description="Epochs of linear warm-up from 0. Source: [C]."
    )
    weight_decay: PositiveOrZero = Field(
        default=0.04, description="Decay at the start. Source: [C]."
    )
    weight_decay_end: PositiveOrZero = Field(
        default=0.4, description="Decay at the end. Source: [C]."
    )
    clip_grad: PositiveOrZero = Field(
        default=3.0,
        description="Gradients are clipped to this L2 norm; 0: not at all. Source: [C].",
    )
    clip_mode: Literal["per_tensor", "per_network", "global"] = Field(
        default="per_tensor",
        description="Whether clip_grad bounds each weight tensor's gradient, as [C] does, the norm "
        "over the backbone and over each head (DINOv2), or the norm over all of them.",
    )

    @model_validator(mode="after")
    def _sgd_has_one_rate(self) -> "OptimConfig":
        if self.name == "sgd":
            for key in ("betas", "layer_decay", "patch_embed_lr", "backbone_lr"):
                value, default = getattr(self, key), type(self).model_fields[key].default
                if value != default:
                    raise ValueError(
                        f"{key}: is of adamw, need {default} with optim.name=sgd, got {value}"
                    )
        return self


class CurveConfig(Section):
    """A curve: linear from start to peak, half a cosine from peak to end, then constant."""

    start: PositiveOrZero = Field(description="Value of the first step of the warm-up.")
    peak: PositiveOrZero = Field(
        description="Value of the first step after the warm-up, where the cosine begins."
    )
    end: PositiveOrZero = Field(
        description="Value of the last step of the cosine, and of all steps after it."
    )
    warmup_epochs: CountOrZero = Field(default=0, description="Length of the warm-up.")
    cosine_epochs: CountOrZero | None = Field(
        default=None, description="Length of the cosine; null: the rest of the run."
    )

    @property
    def values(self) -> tuple[float, float, float]:
        """Start, peak and end."""
        return self.start, self.peak, self.end

    @property
    def reached(self) -> tuple[float, ...]:
        """Those of start, peak and end that the curve has or tends to."""
        start = (self.start,) if self.warmup_epochs else ()
        peak = (self.peak,) if self.warmup_epochs or self.cosine_epochs != 0 else ()
        return (*start, *peak, self.end)

    @property
    def least_epochs(self) -> int:
        """Epochs that the curve needs."""
        return self.warmup_epochs + (self.cosine_epochs or 0)


class SchedulesConfig(Section):
    """Curves in place of formulas of `optim` and `dino`, as in DINOv3; null: the formula.

    A setting that a curve replaces is not read and has to stay at its default.
    """

    lr: CurveConfig | None = Field(
        default=None,
        description="Learning rate, peak and end before optim.lr_scaling, which leaves the start "
        "as it is, as DINOv3's code does; replaces optim.lr, min_lr and warmup_epochs.",
    )
    weight_decay: CurveConfig | None = Field(
        default=None,
        description="Replaces optim.weight_decay and weight_decay_end.",
    )
    momentum: CurveConfig | None = Field(
        default=None, description="Of the teacher; replaces dino.momentum and momentum_end."
    )
    teacher_temp: CurveConfig | None = Field(
        default=None,
        description="Replaces dino.warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs "
        "and teacher_temp_changes.",
    )
    local_weight: CurveConfig | None = Field(
        default=None,
        description="Factor of the class tokens' loss between local and global crops, beside "
        "dino.loss_weight, which multiplies that between global crops too; null: 1.",
    )
    gram_weight: CurveConfig | None = Field(
        default=None,
        description="Factor of gram.loss_weight; null: 1. Where it is 0, the Gram network does not "
        "run, and its crops are not cut.",
    )
    cosine_extra: PositiveOrZero = Field(
        default=0.0,
        description="The cosines of optim and dino are those of a longer run, by this fraction "
        "after the warm-up, cut at the end of this one and stretched to end at the final value "
        "(schedule_trunc_extra in the code of DINOv2 and DINOv3).",
    )

    @property
    def curves(self) -> dict[str, CurveConfig]:
        """Those that are given, by name."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if isinstance(value, CurveConfig)}

    @model_validator(mode="after")
    def _values_make_sense(self) -> "SchedulesConfig":
        if self.lr is not None and not any(self.lr.reached):
            raise ValueError("lr: is 0 in all steps, so nothing would be learned")
        for name in ("momentum", "teacher_temp"):
            curve = getattr(self, name)
            if curve is not None and not min(curve.values) > 0:
                raise ValueError(f"{name}: needs start, peak and end above 0, got {_three(curve)}")
        if self.momentum is not None and max(self.momentum.values) > 1:
            raise ValueError(
                f"momentum: needs start, peak and end of at most 1, got {_three(self.momentum)}"
            )
        if self.cosine_extra and {"lr", "weight_decay", "momentum"} <= self.curves.keys():
            raise ValueError(
                f"cosine_extra: {self.cosine_extra} has no cosine to act on, as rate, decay and "
                "momentum have curves; leave it out"
            )
        return self


def _three(curve: CurveConfig) -> str:
    return ", ".join(str(value) for value in curve.values)


# Curves, and the settings that are not read with them.
REPLACED = {
    "lr": ("optim.lr", "optim.min_lr", "optim.warmup_epochs"),
    "weight_decay": ("optim.weight_decay", "optim.weight_decay_end"),
    "momentum": ("dino.momentum", "dino.momentum_end"),
    "teacher_temp": (
        "dino.warmup_teacher_temp",
        "dino.teacher_temp",
        "dino.warmup_teacher_temp_epochs",
        "dino.teacher_temp_changes",
    ),
}


class TrainConfig(Section):
    """Initial weights, length of the run, batch size, and what ends the run."""

    init_from: PathText | None = Field(
        default=None,
        description="Initial weights of student and teacher: a run, or a weights file or folder of "
        "dinoscale, the reference, timm or Hugging Face; the teacher's if it holds two networks. "
        "Position embeddings are resized to crops.global_size, the first layer is adapted to "
        "data.channels. Not read when a run resumes. null: random. [D].",
    )
    init_head: bool = Field(
        default=False,
        description="Also take the projection head of init_from, whose sizes must be those of "
        "head.*, and of a run its maps to features (distill.*); else these start random. [D].",
    )
    continue_from: PathText | None = Field(
        default=None,
        description="Begin where another run stands, a run directory or one of its checkpoints: "
        "weights of student and teacher, moments of the optimizer and centers, at any number of "
        "ranks and ZeRO stage. Schedules and the order of the images begin anew; position "
        "embeddings are resized to crops.global_size. Not read when a run resumes. [D].",
    )
    epochs: Count = Field(
        default=100,
        description="Passes over the images, or stretches of steps_per_epoch steps. Source: [C].",
    )
    steps_per_epoch: Count | None = Field(
        default=None,
        description="Optimizer steps that count as an epoch, whatever the number of images, "
        "wherever epochs are counted; null: a pass over the images. 1250 in DINOv2.",
    )
    batch_size: Count = Field(
        default=512, description="Images per optimizer step over all ranks. Source: [C], on 8 GPUs."
    )
    micro_batch_size: CountOrAuto = Field(
        default=64,
        description="Most images of one rank in one forward pass; auto: as many as fit in memory, "
        "found by trial when training starts. Source: [C].",
    )
    stop_after_steps: Count | None = Field(
        default=None,
        description="Stop after this many optimizer steps; the schedules do not change.",
    )
    max_bad_steps: Count = Field(
        default=3,
        description="The run ends after this many steps in a row whose loss or gradient is not "
        "finite. [D].",
    )
    max_rollbacks: CountOrZero = Field(
        default=0,
        description="How often the run, instead of ending, returns to its last checkpoint and "
        "skips the images from there to the bad steps. [D].",
    )
    hang_timeout_s: Positive = Field(
        default=1800.0,
        description="The job ends when a rank makes no progress for this many seconds. [D].",
    )
    stop_on_collapse: bool = Field(
        default=False,
        description="End the run, instead of warning, when the targets have collapsed. [D].",
    )

    @model_validator(mode="after")
    def _head_comes_from_somewhere(self) -> "TrainConfig":
        if self.init_head and self.init_from is None:
            raise ValueError("init_head: takes the head of train.init_from, which is null")
        return self

    @model_validator(mode="after")
    def _one_beginning(self) -> "TrainConfig":
        if self.continue_from is not None and self.init_from is not None:
            raise ValueError(
                "continue_from: a run begins with the whole state of another or with the weights "
                "of train.init_from, not with both; set one of them to null"
            )
        return self


class PhaseConfig(Section):
    """A part of a run with settings of its own, which begins where an earlier one ended."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = Field(
        description="Lower-case letters, digits and _; names its folder."
    )
    after: str | None = Field(
        default=None,
        description="Name of the earlier phase at whose end it begins; null: the one before. Two "
        "phases after the same one see the same images in the same order.",
    )
    start: Literal["everything", "teacher"] = Field(
        default="everything",
        description="What the phase takes from that one. everything: as "
        "train.continue_from; teacher: the teacher's weights for both networks, and a new "
        "optimizer, as DINOv3's high-resolution phase.",
    )
    change: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings that differ from those of the file, in the same sections.",
    )
