"""A rank's micro-batches of each step: crops from the loader, on the device, normalised."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dinoscale.config import DataConfig, ModelConfig, RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.data.augmentation.color_jitter import finish_crops
from dinoscale.data.augmentation.crop_params import Params
from dinoscale.data.augmentation.multi_crop import NUM_GLOBAL, MultiCrop
from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.loader import Batch, train_batches
from dinoscale.data.sources.mixture import open_sources
from dinoscale.data.sources.source import Source, StoredSource
from dinoscale.data.transfer import to_device
from dinoscale.engine.drop_path import drop_path_uniforms
from dinoscale.engine.micro_batch import MicroBatch
from dinoscale.errors import ConfigError
from dinoscale.models.stochastic_depth import stochastic_depth_keep
from dinoscale.runtime.launcher_env import Process


def open_images(config: RunConfig, heartbeat: Callable[[], None] = lambda: None) -> StoredSource:
    """Open the images of data.train; `heartbeat` is called regularly meanwhile.

    Raises:
        ConfigError: data.train is not set.
        DataError: they cannot be opened, or more than `data.max_bad_fraction` is left out.
    """
    if not config.data.sources:
        raise ConfigError("data.train: give the images, for example data.train=/path/to/folder")
    return open_sources(
        [part.source for part in config.data.sources],
        Decoder(config.data.channels, config.data.max_pixel_value),
        manifest=config.data.manifest,
        shuffle_buffer=config.data.shuffle_buffer,
        subset_size=config.data.subset_size,
        max_lost=config.data.max_bad_fraction,
        heartbeat=heartbeat,
    )


def multi_crop_of(config: RunConfig) -> MultiCrop:
    """The multi-crop augmentation that a run's data workers apply."""
    return MultiCrop(
        **config.crops.model_dump(),
        **config.augment.model_dump(),
        channels=config.data.channels,
        plain=config.data.color_ops_on == "workers",
    )


def finish_batch(
    batch: Batch, data: DataConfig, device: torch.device, *, compiled: bool = True
) -> tuple[Tensor, Tensor]:
    """Move all crops to the device, apply the colour augmentation and normalise them.

    Args:
        batch: from the loader.
        data: where the colours are augmented, and the normalisation.
        device: of the training.
        compiled: compile the colour augmentation on a GPU.

    Returns:
        Global crops float32 (2, B, C, H, H) and local ones (n, B, C, h, h).
    """
    return (
        _finished(batch.global_crops, batch.params[:NUM_GLOBAL], data, device, compiled=compiled),
        _finished(batch.local_crops, batch.params[NUM_GLOBAL:], data, device, compiled=compiled),
    )


def _finished(
    crops: Tensor, params: Params, data: DataConfig, device: torch.device, *, compiled: bool
) -> Tensor:
    """uint8 (V, B, H, H, C) -> float32 (V, B, C, H, H)."""
    moved = to_device(crops, device)
    if data.color_ops_on == "workers":
        return normalize_images(moved.movedim(-1, 2), mean=data.mean, std=data.std)
    finished: Tensor = finish_crops(
        moved.flatten(0, 1),
        params.reshape(-1),
        mean=data.mean,
        std=data.std,
        compiled=compiled,
    )
    return finished.reshape(*crops.shape[:2], *finished.shape[1:])


class Feed:
    """Yields one rank's micro-batches of every step."""

    def __init__(
        self, config: RunConfig, plan: RunPlan, process: Process, source: Source, *, depth: int
    ) -> None:
        """Open nothing yet; `steps` starts the workers. `depth` is the student's, in blocks."""
        self._config, self._plan, self._process, self._source = config, plan, process, source
        self._depth = depth

    def steps(self, first: int, *, offset: int) -> Iterator[list[Batch]]:
        """The micro-batches of the steps from `first` to the end of the run.

        Args:
            first: step, from 0.
            offset: step s takes the images of step s + offset.
        """
        config, plan = self._config, self._plan
        batches = train_batches(
            self._source,
            multi_crop_of(config),
            batch_size=plan.batch_size,
            micro_batch_size=plan.micro_batch_size,
            seed=config.seed,
            rank=self._process.rank,
            world_size=plan.world_size,
            start_step=first + offset,
            stop_step=plan.stop_step + offset,
            num_workers=config.data.num_workers,
            quotas=plan.quotas,
            stream_readers=config.data.stream_readers,
            pin_memory=self._process.device.type == "cuda",
        )
        for _ in range(first, plan.stop_step):
            yield list(itertools.islice(batches, plan.accumulation_steps))

    def prepare(self, step: int, batches: Iterable[Batch]) -> Iterator[MicroBatch]:
        """Move a step's micro-batches to the device, finish them, and draw their stochastic depth.

        One at a time, and without a reference to the one before: all of them together would take
        the memory that accumulation saves.
        """
        data, device = self._config.data, self._process.device
        compiled = self._config.engine.compile is not False
        for index, batch in enumerate(batches):
            yield MicroBatch(
                *finish_batch(batch, data, device, compiled=compiled), self._keep(step, index)
            )

    def _keep(self, step: int, micro_batch: int) -> Tensor | None:
        model, plan = self._config.model, self._plan
        if not model.drop_path_rate:
            return None
        slot = micro_batch * plan.world_size + self._process.rank
        uniforms = drop_path_uniforms(
            seed=self._config.seed,
            step=step,
            first_image=slot * plan.micro_batch_size,
            images=plan.micro_batch_size,
            crops=2 + self._config.crops.num_local,
            depth=self._depth,
        )
        return to_device(keep_of(uniforms, model), self._process.device)


def keep_of(uniforms: Tensor, model: ModelConfig) -> Tensor:
    """The student's `keep` argument for stochastic depth, (depth, 2, S * B) float32.

    Args:
        uniforms: in [0, 1), one for each block, branch and crop, same shape.
        model: `drop_path_mode` subset passes the uniforms on; else they become multipliers.
    """
    if model.drop_path_mode == "subset":
        return uniforms
    return stochastic_depth_keep(uniforms, drop_path_rate=model.drop_path_rate)
