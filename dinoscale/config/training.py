"""Settings of the training itself.

Sources: [C] code of Caron et al. 2021 (arXiv:2104.14294), its command-line defaults; [D] ours.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dinoscale.config.fields import Count, CountOrAuto, CountOrZero, PathText, Positive, Section


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
        "head.*; else the head starts random. [D].",
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
    """A part of a run with settings of its own, which begins where the phase before ended."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = Field(
        description="Lower-case letters, digits and _; names its folder."
    )
    start: Literal["everything", "teacher"] = Field(
        default="everything",
        description="What the phase takes from the one before. everything: as "
        "train.continue_from; teacher: the teacher's weights for both networks, and a new "
        "optimizer, as DINOv3's high-resolution phase.",
    )
    change: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings that differ from those of the file, in the same sections.",
    )
