"""Settings of evaluation, log and checkpoints."""

from pydantic import Field, model_validator

from dinoscale.config.sections.fields import Count, CountOrZero, Counts, PathText, Section


class EvalConfig(Section):
    """Online k-NN accuracy on labelled images; off while `train` and `test` are null.

    A run without it and without a guard can measure RankMe, which needs no labels.
    """

    train: PathText | None = Field(default=None, description="Labelled images of the neighbours.")
    test: PathText | None = Field(default=None, description="Labelled images to classify.")
    every_epochs: Count = Field(
        default=1, description="Epochs between two evaluations. Source: [D]."
    )
    resize: Count = Field(
        default=256, description="Shorter side after resizing, in pixels. Source: [C]."
    )
    crop: Count = Field(default=224, description="Side of the centre crop in pixels. Source: [C].")
    k: Count = Field(default=20, description="Neighbours that vote. Source: [P] section 3.2.")
    batch_size: Count = Field(
        default=64, description="Images per rank in one forward pass. Source: [D]."
    )
    rank_images: CountOrZero = Field(
        default=0,
        description="Without eval.train and without a guard: how many training images, a fixed "
        "choice, have their RankMe and alpha-ReQ measured every every_epochs, at one forward of "
        "the teacher's backbone each; of a mixture those of the first source. RankMe is at most "
        "this. 0: none. Nothing is measured where images are streamed, as none are stored to "
        "choose from. At stage 3 every GPU holds a whole copy of the backbone in the compute dtype "
        "meanwhile. 512 in the presets, but 0 for 7B. [D].",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "EvalConfig":
        if (self.train is None) != (self.test is None):
            given, other = ("train", "test") if self.test is None else ("test", "train")
            raise ValueError(f"{other}: missing; eval.{given} is set, and k-NN needs both")
        if self.resize < self.crop:
            raise ValueError(
                f"resize: {self.resize} px is smaller than the {self.crop} px cut from it "
                "(eval.crop)"
            )
        return self


class LogConfig(Section):
    """Metrics during the run. Source: [D]."""

    every_steps: Count = Field(default=10, description="Optimizer steps between two log lines.")
    wandb: bool = Field(
        default=True,
        description="Also log to Weights & Biases; mode from WANDB_MODE, else offline.",
    )
    wandb_project: str = Field(default="dinoscale", min_length=1, description="Its project.")


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept. Source: [D]."""

    every_epochs: Count = Field(default=1, description="Epochs between two checkpoints.")
    every_steps: Count | None = Field(
        default=None, description="Optimizer steps between additional checkpoints; null: none."
    )
    keep_last: Count = Field(default=2, description="Newest checkpoints to keep.")
    keep_every: Count | None = Field(
        default=None, description="Also keep those at multiples of this many epochs; null: none."
    )
    keep_steps: Counts = Field(
        default=(),
        description="Also keep those of these steps, to which a phase adds those that later phases "
        "name in gram.teacher.",
    )
    keep_best: bool = Field(
        default=True,
        description="Also keep the one with the highest online k-NN accuracy, or with a guard the "
        "highest guard.measure.",
    )
