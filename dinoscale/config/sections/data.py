"""Settings of the training images.

Sources: [C] code of Caron et al. 2021 (arXiv:2104.14294), its command-line defaults; [D] ours.
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dinoscale.config.sections.fields import (
    Count,
    CountOrZero,
    Fraction,
    Fractions,
    PathText,
    Positive,
    Positives,
    Section,
    TrainingImages,
    WeightedSource,
)


class DataConfig(Section):
    """The training images."""

    train: TrainingImages | None = Field(
        default=None,
        description="Images to train on: a folder, shards, 'synthetic:...', or a mixture of them, "
        "[{source: ..., weight: ...}, ...]; or shards to stream (https:, s3:, gs:, hdfs:, pipe:).",
    )
    images_per_epoch: Count | None = Field(
        default=None,
        description="Images drawn in an epoch, rounded down to whole steps; null: as many as there "
        "are. All images of a source are drawn equally often in any case. [D].",
    )
    subset_size: Count | None = Field(
        default=None,
        description="Train on a subset of this many images; null: on all. The subset does not "
        "depend on the seed, and a smaller one is part of a larger one. [D].",
    )
    manifest: PathText | None = Field(
        default=None,
        description="File with the number of images in each streamed shard, a path or URL; null: "
        "manifest.json beside the shards.",
    )
    stream_readers: Count = Field(
        default=8,
        description="Streamed shards: places in the stream that are read at the same time, for "
        "each micro-batch of a step over all ranks. A multiple of num_workers keeps all workers "
        "busy. [D].",
    )
    shuffle_buffer: Count = Field(
        default=512,
        description="Streamed shards: most neighbouring images that are held, as files, to be "
        "shuffled, for each of stream_readers x micro-batches of a step. [D].",
    )
    num_workers: CountOrZero = Field(
        default=8,
        description="Loader processes per rank; 0: the training process loads. Source: [D].",
    )
    color_ops_on: Literal["device", "workers"] = Field(
        default="device",
        description="Where color jitter, blur and solarization run. device: in batches on the "
        "training device; workers: crop by crop in the loader processes, the slow reference. [D].",
    )
    max_bad_fraction: Fraction = Field(
        default=0.01,
        description="The run stops when a larger fraction of the images cannot be read, or is left "
        "out because of their names. [D].",
    )
    channels: Count = Field(
        default=3,
        description="Channels of an image: 3 RGB, 1 gray, else exactly as in the files. Images are "
        "converted to 8 bit; without RGB, saturation, hue and gray are off. [D].",
    )
    max_pixel_value: Positive | None = Field(
        default=None,
        description="Pixel value that means 1.0 in files of more than 8 bit; null: guessed for "
        "each image, as the largest value of the smallest usual depth that holds its pixels. [D].",
    )
    mean: Fractions = Field(
        default=(0.485, 0.456, 0.406),
        description="Mean of each channel in [0, 1], here R, G, B over ImageNet. Source: [C].",
    )
    std: Positives = Field(
        default=(0.229, 0.224, 0.225), description="Their standard deviation. Source: [C]."
    )

    @field_validator("train")
    @classmethod
    def _mixture_of_something(cls, train: TrainingImages | None) -> TrainingImages | None:
        if train == ():
            raise ValueError("a mixture of nothing; name a source, or null for none")
        return train

    @model_validator(mode="after")
    def _chosen_from_one_source(self) -> "DataConfig":
        if self.subset_size is not None and len(self.sources) > 1:
            raise ValueError(
                f"subset_size: {self.subset_size} images cannot be chosen from a mixture "
                f"of {len(self.sources)} sources (data.train); name one source, or null for all"
            )
        return self

    @property
    def sources(self) -> tuple[WeightedSource, ...]:
        """The sources in `train`: a plain text is a mixture of one, null of none.

        Sources of a mixture keep their order: the numbers of the images depend on it.
        """
        if self.train is None:
            return ()
        return (WeightedSource(source=self.train),) if isinstance(self.train, str) else self.train

    @property
    def sources_text(self) -> str:
        """The same in words."""
        if len(self.sources) == 1:
            return self.sources[0].source
        return " + ".join(f"{part.weight:g} x {part.source}" for part in self.sources)

    @model_validator(mode="after")
    def _channels_agree(self) -> "DataConfig":
        for key, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != self.channels:
                raise ValueError(
                    f"{key}: needs one number for each of {self.channels} channels "
                    f"(data.channels), got {len(numbers)}; `dinoscale data dataset-stats` "
                    "measures them"
                )
        if self.color_ops_on == "workers" and self.channels not in (1, 3):
            raise ValueError(
                "color_ops_on: 'workers' needs data.channels 1 or 3, "
                f"got {self.channels}; set data.color_ops_on=device"
            )
        return self
