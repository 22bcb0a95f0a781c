"""One run of a sweep worked out: base, settings, axes, rules.

A run is the base with the settings of the sweep, the values of its axes, and what the rules make
of them. It keeps the epochs of the base (train.epochs), so that warm-up and all phases keep their
shares; the axes images and flops set how many images an epoch has, in whole steps.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from dinoscale.config import (
    DataConfig,
    RunConfig,
    load_config,
    parse_config,
    resolve,
    without_auto,
)
from dinoscale.config.backbones import VitSize
from dinoscale.config.layers import sizes_of_another
from dinoscale.config.sweep.axes import KEYS_OF_AXES
from dinoscale.config.sweep.file import ONLINE, SweepConfig
from dinoscale.data.sources.mixture import source_sizes
from dinoscale.engine.model_sizes import Dims, dims_of, flops_of
from dinoscale.errors import ConfigError, DataError
from dinoscale.scaling.design.apply_rules import Sizes, ruled_settings
from dinoscale.scaling.design.axis_values import Point, in_words, label_of
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.design.run_key import key_of
from dinoscale.training.feed import open_images

_cached_dims = functools.lru_cache(maxsize=None)(dims_of)


def dims_of_run(config: RunConfig) -> Dims:
    """`dims_of`, built once for all runs whose networks and crops are equal.

    Raises:
        ConfigError: the backbone is unknown, or it is not a ViT.
    """
    data = DataConfig().model_copy(update={"channels": config.data.channels})
    parts = {"model": config.model, "head": config.head, "crops": config.crops, "data": data}
    return _cached_dims(RunConfig().model_copy(update=parts))


@dataclass(frozen=True)
class Candidate:
    """A run before its length and the rules are applied.

    Attributes:
        point: of the design.
        sketch: configuration with all axes that set one directly.
        dims: of its network and crops.
        budget_images: images that the axis images or flops gives it, None without both.
    """

    point: Point
    sketch: RunConfig
    dims: Dims
    budget_images: float | None

    @property
    def axes(self) -> dict[str, object]:
        """As of `PlannedRun`."""
        return in_words(self.point)


class Planner:
    """Works out the runs of a sweep.

    Args:
        sweep: the sweep.

    Attributes:
        sweep: the same.
        notes: what had to be assumed so far, in words.

    Raises:
        ConfigError: base and settings are wrong.
    """

    def __init__(self, sweep: SweepConfig) -> None:
        self.notes: list[str] = []
        self.sweep = sweep
        self._world_size = sweep.executor.nodes * sweep.executor.processes
        self._sets: dict[str, tuple[int, ...] | None] = {}
        settings = dict(sweep.settings)
        if "warmup" in sweep.rules.given:
            settings["optim.warmup_epochs"] = 0  # the rule will say; the base's may be too long
        base = load_config(sweep.base).model_dump()
        self._base = parse_config(_with(base, settings), origin="settings of the sweep")
        self._base_sizes = self._sizes(self._base, dims_of_run(self._base))

    def candidate(self, point: Point) -> Candidate:
        """Model, images and all that does not depend on them.

        Raises:
            ConfigError: a value is impossible.
        """
        sketch = self._with_base({**self._direct(point), "optim.min_lr": 0.0})
        dims = dims_of_run(sketch)
        images = point.get("images")
        budget = point.get("flops")
        if isinstance(budget, float):
            images = budget / flops_of(dims).total
        assert images is None or isinstance(images, int | float)
        return Candidate(point, sketch, dims, images)

    def planned(self, candidate: Candidate) -> PlannedRun:
        """The run with its length and all that the rules give.

        Raises:
            ConfigError: it is impossible.
        """
        settings = self._direct(candidate.point)
        sketch = candidate.sketch
        if candidate.budget_images is not None:
            settings["data.images_per_epoch"] = _images_per_epoch(sketch, candidate.budget_images)
            sketch = self._with_base({**settings, "optim.min_lr": 0.0})
        factor = candidate.point.get("lr_factor", 1.0)
        assert isinstance(factor, float)
        settings |= ruled_settings(
            self.sweep.rules,
            sketch,
            sizes=self._sizes(sketch, candidate.dims),
            base=self._base_sizes,
            lr_factor=factor,
        )
        config = self._with_base(settings)
        self._require_measurable(config)
        return self._as_run(candidate, config)

    def _as_run(self, candidate: Candidate, config: RunConfig) -> PlannedRun:
        sizes = self._set_sizes(config)
        total = None if sizes is None else sum(sizes)
        of_epoch = self._epoch(config)
        if of_epoch is None:
            raise ConfigError(
                "how many images there are is not known, as data.train cannot be opened here; "
                "add the axis images, or set data.images_per_epoch in settings"
            )
        distinct = config.data.subset_size
        num_images = sizes or (max(of_epoch, distinct or 0),)
        plan = resolve(without_auto(config), world_size=self._world_size, num_images=num_images)
        images, key = plan.stop_step * plan.batch_size, key_of(config)
        limits = (distinct, total, images)
        return PlannedRun(
            key=key,
            name=f"{label_of(candidate.point)}-{key[:8]}",
            config=config,
            axes=candidate.axes,
            parameters=candidate.dims.backbone,
            flops_per_image=flops_of(candidate.dims).total,
            images=images,
            distinct_images=min(limit for limit in limits if limit is not None),
            steps=plan.stop_step,
            rules=self.sweep.rules.model_dump(exclude_unset=True),
        )

    def _direct(self, point: Point) -> dict[str, object]:
        """Settings that follow from one axis each."""
        settings: dict[str, object] = {}
        for name, value in point.items():
            if isinstance(value, VitSize):
                sizes = (value.embed_dim, value.depth, value.num_heads)
                settings |= dict(zip(KEYS_OF_AXES["model"], sizes, strict=True))
            elif name == "subset_size":
                settings["data.subset_size"] = self._distinct(value, point)
            elif name not in ("images", "flops", "lr_factor"):
                (key,) = KEYS_OF_AXES.get(name, (name,))
                settings[key] = value
        return settings

    def _distinct(self, value: object, point: Point) -> object:
        """A fraction as a number of images."""
        if not isinstance(value, float):
            return value
        train = point.get("data.train", self._base.data.train)
        config = self._with_base({"data.train": train})
        sizes = self._set_sizes(config)
        if sizes is None:
            raise ConfigError(
                f"subset_size: {value:g} of how many is not known, as data.train cannot be "
                "opened here; write a number of images"
            )
        return max(1, round(value * sum(sizes)))

    def _with_base(self, settings: Mapping[str, object]) -> RunConfig:
        return parse_config(_with(self._base.model_dump(), settings))

    def _sizes(self, config: RunConfig, dims: Dims) -> Sizes:
        of_epoch, batch_size = self._epoch(config), config.train.batch_size
        images = None
        if of_epoch is not None:
            images = config.train.epochs * (of_epoch // batch_size * batch_size)
        return Sizes(
            batch_size=batch_size,
            width=dims.embed_dim,
            depth=dims.depth,
            images=images,
            parameters=dims.backbone,
        )

    def _epoch(self, config: RunConfig) -> int | None:
        """Images of an epoch before it is rounded to whole steps; None where not known."""
        sizes, data = self._set_sizes(config), config.data
        if data.images_per_epoch is not None:
            return data.images_per_epoch
        if data.subset_size is not None or sizes is None:
            return data.subset_size
        return sum(sizes)

    def _set_sizes(self, config: RunConfig) -> tuple[int, ...] | None:
        """Images of each source; None, with a note, where they cannot be opened."""
        name = config.data.sources_text
        if not config.data.sources:
            raise ConfigError("data.train: is not set; name the images, in settings or in the base")
        if name not in self._sets:
            try:
                found = source_sizes(open_images(config))
                self._sets[name] = (found,) if isinstance(found, int) else tuple(found)
            except DataError as error:
                self._sets[name] = None
                self.notes.append(
                    f"data.train cannot be opened here ({error}); as many different images as a "
                    "run sees, unless data.subset_size says less"
                )
        return self._sets[name]

    def _require_measurable(self, config: RunConfig) -> None:
        if self.sweep.metrics.get("knn") == ONLINE and config.eval.train is None:
            raise ConfigError(
                "metrics.knn: 'online' needs labelled images; set eval.train and eval.test in "
                "settings"
            )


def _images_per_epoch(config: RunConfig, images: float) -> int:
    """Whole steps; the run then sees fewer than asked for by less than a step an epoch."""
    epochs, batch_size = config.train.epochs, config.train.batch_size
    steps = int(images / epochs) // batch_size
    if steps == 0:
        raise ConfigError(
            f"its {images:,.0f} images are less than one step of {batch_size:,} images in each of "
            f"{epochs:,} epochs, {epochs * batch_size:,}; set fewer train.epochs in settings, or a "
            "smaller batch"
        )
    return steps * batch_size


def _with(values: Mapping[str, object], settings: Mapping[str, object]) -> dict[str, object]:
    """Sections by key with settings by dotted key."""
    merged: dict[str, object] = copy.deepcopy(dict(values))
    given = {key[6:]: settings[key] for key in settings if key.startswith("model.")}
    model = merged["model"]
    assert isinstance(model, dict)
    model |= dict.fromkeys(sizes_of_another(model, given))
    for dotted, value in settings.items():
        section, _, name = dotted.partition(".")
        if name:
            inner = merged[section]
            assert isinstance(inner, dict)
            inner[name] = value
        else:
            merged[section] = value
    return merged
