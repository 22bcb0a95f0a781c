"""A rank's micro-batches of each step: crops from the loader, on the device, normalised."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dinoscale.config import DataConfig, ModelConfig, RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.data.augmentation.color_jitter import finish_crops
from dinoscale.data.augmentation.crop_params import Params, gram_params
from dinoscale.data.augmentation.masks import Masks, draw_masks
from dinoscale.data.augmentation.mixed_sizes import MixedSizes, drawn_size
from dinoscale.data.augmentation.multi_crop import NUM_GLOBAL, MultiCrop
from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.loader import Batch, train_batches
from dinoscale.data.sources.mixture import open_sources
from dinoscale.data.sources.source import Source, StoredSource
from dinoscale.data.transfer import to_device
from dinoscale.engine.draws import drop_path_uniforms, rope_uniforms
from dinoscale.engine.frozen.gram import crop_size_of
from dinoscale.engine.micro_batch import MicroBatch
from dinoscale.errors import ConfigError
from dinoscale.models.rope import coordinate_changes
from dinoscale.models.stochastic_depth import stochastic_depth_keep
from dinoscale.runtime.launcher_env import Process
from dinoscale.training.targets.read import TargetReader


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


def run_of_step(config: RunConfig, step: int) -> RunConfig:
    """The run with the sizes of a step's crops, of those that it mixes; `step` as in `Feed.steps`.

    Skipped images take their sizes with them: step s of a run has those of s + offset.
    """
    return config.of_sizes[drawn_size(config.size_weights, seed=config.seed, step=step)]


def mixed_sizes_of(config: RunConfig) -> MixedSizes:
    """The multi-crop augmentation that a run's data workers apply in each of its sizes."""
    return MixedSizes([multi_crop_of(run) for run in config.of_sizes], config.size_weights)


def multi_crop_of(config: RunConfig) -> MultiCrop:
    """The multi-crop augmentation of a run of one size, such as one of `RunConfig.of_sizes`."""
    return MultiCrop(
        **config.crops.model_dump(exclude={"mixture"}),
        **config.augment.model_dump(),
        gram_size=crop_size_of(config) if config.gram.loss_weight else None,
        gram_colors=config.gram.crop_colors,
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


def finish_gram_crops(
    batch: Batch, config: RunConfig, device: torch.device, *, compiled: bool = True
) -> Tensor | None:
    """The same of the Gram crops, float32 (2, B, C, G, G), whose colours change only if wanted.

    None if there are none.
    """
    if not len(batch.gram_crops):
        return None
    params = gram_params(
        batch.params[:NUM_GLOBAL],
        magnified=batch.gram_crops.shape[2] / batch.global_crops.shape[2],
        colors=config.gram.crop_colors,
    )
    return _finished(batch.gram_crops, params, config.data, device, compiled=compiled)


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
        self,
        config: RunConfig,
        plan: RunPlan,
        process: Process,
        source: Source,
        *,
        depth: int,
        targets: TargetReader | None = None,
    ) -> None:
        """Open nothing yet; `steps` starts the workers.

        Args:
            config: of the run.
            plan: of the run.
            process: this one.
            source: the images.
            depth: of the student, in blocks.
            targets: what is stored of a frozen teacher.
        """
        self._config, self._plan, self._process, self._source = config, plan, process, source
        self._depth, self._targets = depth, targets

    def close(self) -> None:
        """Let go of what is stored of a frozen teacher."""
        if self._targets is not None:
            self._targets.close()

    def steps(
        self,
        first: int,
        *,
        offset: int,
        gram_counts: Callable[[int], bool] = lambda _step: True,
    ) -> Iterator[list[Batch]]:
        """The micro-batches of the steps from `first` to the end of the run.

        Args:
            first: step, from 0.
            offset: step s takes the images of step s + offset.
            gram_counts: whether a step needs its Gram crops, in a run that has some.
        """
        config, plan = self._config, self._plan
        batches = train_batches(
            self._source,
            mixed_sizes_of(config),
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
            gram_counts=lambda step: gram_counts(step - offset),
            pin_memory=self._process.device.type == "cuda",
        )
        for _ in range(first, plan.stop_step):
            yield list(itertools.islice(batches, plan.accumulation_steps))

    def prepare(self, step: int, batches: Sequence[Batch]) -> "MicroBatches":
        """A step's micro-batches, each finished on the device when asked for."""
        return MicroBatches(len(batches), lambda index: self.finish(step, index, batches[index]))

    def finish(self, step: int, index: int, batch: Batch) -> MicroBatch:
        """Move micro-batch `index` of a step to the device and finish it.

        Its stochastic depth, masks and coordinates are drawn here: a function of its place in the
        step, so that it can be made again.
        """
        config, plan, device = self._config, self._plan, self._process.device
        first_image = (index * plan.world_size + self._process.rank) * plan.micro_batch_size
        compiled = config.engine.compile is not False
        crops = finish_batch(batch, config.data, device, compiled=compiled)
        keep = self._keep(step, first_image)
        masks = masks_of(
            config,
            step=step,
            first_image=first_image,
            images=plan.micro_batch_size,
            size=batch.global_crops.shape[2],
        )
        stored = None
        if self._targets is not None:
            rows = masks.rows if masks is not None and config.distill.by_heads else None
            stored = self._targets.of(step, index, batch, rows)
        if masks is not None:
            masks = Masks(*(to_device(tensor, device) for tensor in masks))
        coordinates = coordinates_of(config, step=step, depth=self._depth)
        if coordinates is not None:
            coordinates = to_device(coordinates, device)
        gram_crops = finish_gram_crops(batch, config, device, compiled=compiled)
        return MicroBatch(*crops, keep, masks, coordinates, gram_crops, stored)

    def _keep(self, step: int, first_image: int) -> Tensor | None:
        model = self._config.model
        if not model.drop_path_rate:
            return None
        uniforms = drop_path_uniforms(
            seed=self._config.seed,
            step=step,
            first_image=first_image,
            images=self._plan.micro_batch_size,
            crops=NUM_GLOBAL + self._config.crops.num_local,
            depth=self._depth,
        )
        return to_device(keep_of(uniforms, model), self._process.device)


class MicroBatches(Sequence[MicroBatch]):
    """The micro-batches of a step, each made when asked for, as often as it is asked for.

    All of them together would take the memory that accumulation saves. So only the last one made is
    kept: until another one is asked for, or the end of an iteration.
    """

    def __init__(self, count: int, make: Callable[[int], MicroBatch]) -> None:
        """Make none yet; `make` gives the micro-batch of an index, the same whenever called."""
        self._count, self._make = count, make
        self._kept: tuple[int, MicroBatch] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> MicroBatch:  # type: ignore[override]  # no slices
        if not 0 <= index < self._count:
            raise IndexError(f"need 0 <= index < {self._count}, got {index}")
        if self._kept is None or self._kept[0] != index:
            self.release()  # frees its memory for the next
            self._kept = index, self._make(index)
        return self._kept[1]

    def __iter__(self) -> Iterator[MicroBatch]:
        for index in range(self._count):
            yield self[index]
        self.release()

    def release(self) -> None:
        """Forget the last one made."""
        self._kept = None


def masks_of(
    config: RunConfig, *, step: int, first_image: int, images: int, size: int | None = None
) -> Masks | None:
    """The masks of some images of a step, on the CPU; None if the run has no patch loss.

    A student of a frozen teacher sees the patches that are drawn, too.

    Args:
        config: of the run.
        step: zero-based optimizer step.
        first_image: position of the first image in the step's global batch.
        images: number of consecutive images, a multiple of `ibot.mask_group`.
        size: side of the global crops of the step in pixels; None for `crops.global_size`.
    """
    ibot, patch_size = config.ibot, config.model.effective_patch_size
    if not ibot.loss_weight or patch_size is None:
        return None
    side = (size or config.crops.global_size) // patch_size
    masks = draw_masks(
        seed=config.seed,
        step=step,
        first_image=first_image,
        images=images,
        grid=(side, side),
        prob=ibot.mask_prob,
        ratio=ibot.mask_ratio,
        rule=ibot.mask_rule,
        group=ibot.mask_group,
    )
    return masks.seen() if config.distill.by_heads else masks


def coordinates_of(config: RunConfig, *, step: int, depth: int) -> Tensor | None:
    """Changes of rotary coordinates in a step, on the CPU; None if the run makes none.

    Args:
        config: of the run.
        step: zero-based optimizer step.
        depth: blocks of the student.

    Returns:
        (2, depth, 5) float32, of global and of local crops, see `rope.coordinate_changes`.
    """
    rope = config.model.rope
    if rope is None or not rope.changes:
        return None
    uniforms = rope_uniforms(seed=config.seed, step=step, depth=depth)
    changes = coordinate_changes(
        uniforms, shift=rope.shift, jitter=rope.jitter, rescale=rope.rescale
    )
    return changes.float()


def keep_of(uniforms: Tensor, model: ModelConfig) -> Tensor:
    """The student's `keep` argument for stochastic depth, (depth, 2, S * B) float32.

    Args:
        uniforms: in [0, 1), one for each block, branch and crop, same shape.
        model: `drop_path_mode` subset passes the uniforms on; else they become multipliers.
    """
    if model.drop_path_mode == "subset":
        return uniforms
    return stochastic_depth_keep(
        uniforms, drop_path_rate=model.drop_path_rate, uniform=model.drop_path_uniform
    )
