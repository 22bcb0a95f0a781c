"""Settings of the guard, which compares the teacher with its start and its best."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dinoscale.config.sections.fields import (
    Count,
    CountOrZero,
    Fraction,
    PathText,
    Section,
    is_streamed,
)

_MOST_VIEWS = 2**17  # with their copies 1.6 GB of each GPU at a width of 1,024


class GuardConfig(Section):
    """The teacher against its start and its best so far, on held-out images.

    Each measurement has a checkpoint; the best one is kept, and its teacher is written to
    `best.safetensors` in the run directory when the run ends. Phases go on from the start and the
    best of the one before, and have one `best.safetensors`, that of the whole run. Numbers of other
    images, or of other `eval.resize` and `eval.crop`, do not compare: the guard then begins anew.
    Where k-NN decides, nor do those of other `eval.train`, `eval.test` and `eval.k`; where LiDAR
    does, of other `lidar_views`. Elsewhere only LiDAR itself begins anew with these. Off while
    `every_steps` is null.
    """

    every_steps: Count | None = Field(
        default=None,
        description="Optimizer steps between two measurements, the first before step 1; null: no "
        "guard. [D].",
    )
    images: PathText | None = Field(
        default=None,
        description="Held-out images, whose labels are not read; null: those of eval.train, or "
        "without them the first source of data.train, which shows a ruined teacher as well.",
    )
    num_images: int = Field(
        default=2048,
        ge=2,
        le=25_000,
        description="How many of them are measured, a fixed choice. RankMe is at most this. [D].",
    )
    lidar_views: CountOrZero = Field(
        default=0,
        description="Augmented views of each of these images that LiDAR compares, always the same; "
        "0: no LiDAR, which costs as many forwards of each image as it has views, where all else "
        "costs one. Published are 50 views of 1,000 images; `dinoscale evaluate rank` takes them. "
        "Each GPU holds up to 12 bytes x num_images x lidar_views x width of the backbone "
        "meanwhile, 0.1 GB for 2,048 x 4 x 1,024; at most 131,072 views in all. [D].",
    )
    measure: Literal["rankme", "lidar", "knn_top1"] = Field(
        default="rankme",
        description="What decides which teacher is the best: the effective rank of its features, "
        "that of what tells images apart beyond their views, or its k-NN accuracy on eval.test. "
        "[D].",
    )
    max_fall: Fraction = Field(
        default=0.1,
        description="Fall of the measure from its best that counts, as a fraction of that. [D].",
    )
    min_agreement: Fraction = Field(
        default=0.0,
        description="Least fraction of an image's 10 nearest neighbours that are those of the "
        "start; below it the teacher counts as fallen, whatever the measure says. [D].",
    )
    on_fall: Literal["warn", "stop", "roll_back"] = Field(
        default="warn",
        description="warn: an event and a warning. stop: end the run there. roll_back: end it, and "
        "set the later checkpoints aside, so that it resumes from the best one.",
    )

    @field_validator("lidar_views")
    @classmethod
    def _two_views(cls, views: int) -> int:
        if views == 1:
            raise ValueError(
                "LiDAR compares views of an image, need 2 or more, or 0 for none; got 1"
            )
        return views

    @model_validator(mode="after")
    def _views_fit_memory(self) -> "GuardConfig":
        views = self.num_images * self.lidar_views
        if views > _MOST_VIEWS:
            raise ValueError(
                f"lidar_views: {self.lidar_views} of each of {self.num_images} images are {views}"
                f" views, need {_MOST_VIEWS} or fewer: lower it or num_images"
            )
        return self

    def mistakes(self, *, images: str | None, labelled: bool, keeps_best: bool) -> list[str]:
        """What the guard lacks.

        Args:
            images: what it measures; None if nothing is named yet.
            labelled: whether k-NN is measured.
            keeps_best: whether the best checkpoint is kept.
        """
        if self.every_steps is None:
            return []
        mistakes = []
        if is_streamed(images or ""):
            mistakes.append(
                f"guard.images: {images} is streamed, and the guard measures stored images; name "
                "some in guard.images, or set guard.every_steps to null"
            )
        if self.measure == "knn_top1" and not labelled:
            mistakes.append(
                "guard.measure: 'knn_top1' needs labelled images in eval.train and eval.test; "
                "'rankme' needs no labels"
            )
        if self.measure == "lidar" and not self.lidar_views:
            mistakes.append(
                "guard.measure: 'lidar' needs views of each image, guard.lidar_views 2 or more; got"
                " 0. 'rankme' needs none"
            )
        if not keeps_best:
            mistakes.append(
                "checkpoint.keep_best: the guard exports the best checkpoint and returns to it, "
                "need true (or guard.every_steps null)"
            )
        return mistakes

    @property
    def ends_runs(self) -> bool:
        """Whether a fall ends the run."""
        return self.every_steps is not None and self.on_fall != "warn"
