"""Resolve one run of a sweep: base, settings, axes, rules.

A run is the base configuration, overridden by the settings of the sweep, its axis values, and
finally the rules. It keeps the epochs of the base (train.epochs), so that the warm-up and all
phases keep their fractions of the training; the axes images and flops set the number of images per
epoch, in whole steps.
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
from dinoscale.config.layers import drop_one_size, sizes_of_another
from dinoscale.config.sections.backbones import VitSize
from dinoscale.config.sweep.axes import KEYS_OF_AXES
from dinoscale.config.sweep.file import ONLINE, SweepConfig
from dinoscale.data.sources.mixture import source_sizes
from dinoscale.engine.model_sizes import Dims, dims_of, flops_of
from dinoscale.errors import ConfigError, DataError
from dinoscale.scaling.design.apply_rules import Sizes, apply_rules
from dinoscale.scaling.design.axis_values import Point, axes_of, label_of
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.design.run_key import key_of
from dinoscale.training.feed import open_images

_cached_dims = functools.lru_cache(maxsize=None)(dims_of)


def dims_of_run(config: RunConfig) -> Dims:
    """`dims_of`, cached over runs with equal networks and crops.

    Raises:
        ConfigError: the backbone is unknown or not a ViT.
    """
    data = DataConfig().model_copy(update={"channels": config.data.channels})
    sections = ("model", "head", "patch_head", "crops", "ibot", "gram", "distill")
    parts = {section: getattr(config, section) for section in sections}
    plain = RunConfig()
    # Whether there are heads.
    dino = plain.dino.model_copy(update={"loss_weight": config.dino.loss_weight})
    return _cached_dims(plain.model_copy(update={**parts, "data": data, "dino": dino}))


@dataclass(frozen=True)
class DraftRun:
    """A run before its length is set and the rules are applied.

    Attributes:
        point: its point of the design.
        config: configuration with every axis that sets a key directly.
        dims: dimensions of its network and crops.
        budget_images: images set by the axis images or flops; None without either.
    """

    point: Point
    config: RunConfig
    dims: Dims
    budget_images: float | None

    @property
    def axes(self) -> dict[str, object]:
        """As in `PlannedRun`."""
        return axes_of(self.point)


class Planner:
    """Resolves the runs of a sweep.

    Args:
        sweep: the sweep.

    Attributes:
        sweep: the sweep.
        notes: assumptions made so far, in sentences.

    Raises:
        ConfigError: the base or the settings are invalid.
    """

    def __init__(self, sweep: SweepConfig) -> None:
        self.notes: list[str] = []
        self.sweep = sweep
        self._world_size = sweep.executor.nodes * sweep.executor.processes
        self._sets: dict[str, tuple[int, ...] | None] = {}
        settings = dict(sweep.settings)
        if "warmup" in sweep.rules.given:
            settings["optim.warmup_epochs"] = 0  # set by the rule; the base's may be too long
        base = load_config(sweep.base)
        if base.phases:
            raise ConfigError(
                f"base: {sweep.base} has phases, and the runs of a sweep have one part; name a file"
                " without phases"
            )
        values = _with(base.model_dump(), settings)
        self._base = parse_config(values, origin="settings of the sweep")
        self._base_sizes = self._sizes(self._base, dims_of_run(self._base))

    def draft(self, point: Point) -> DraftRun:
        """The model, the number of images, and all settings that do not depend on them.

        Raises:
            ConfigError: a value is invalid.
        """
        config = self._with_base(self._below_any_peak(self._direct(point)))
        dims = dims_of_run(config)
        images = point.get("images")
        budget = point.get("flops")
        if isinstance(budget, float):
            images = budget / flops_of(dims).total
        assert images is None or isinstance(images, int | float)
        return DraftRun(point, config, dims, images)

    def planned(self, draft: DraftRun) -> PlannedRun:
        """The complete run, with its length and the settings that the rules give.

        Raises:
            ConfigError: the run is invalid.
        """
        settings = self._direct(draft.point)
        unruled = draft.config
        if draft.budget_images is not None:
            settings["data.images_per_epoch"] = _images_per_epoch(unruled, draft.budget_images)
            settings["train.steps_per_epoch"] = None
            unruled = self._with_base(self._below_any_peak(settings))
        factor = draft.point.get("lr_factor", 1.0)
        assert isinstance(factor, float)
        settings |= apply_rules(
            self.sweep.rules,
            unruled,
            sizes=self._sizes(unruled, draft.dims),
            base=self._base_sizes,
            lr_factor=factor,
        )
        config = self._with_base(settings)
        self._require_measurable(config)
        return self._as_run(draft, config)

    def _as_run(self, draft: DraftRun, config: RunConfig) -> PlannedRun:
        sizes = self._set_sizes(config)
        total = None if sizes is None else sum(sizes)
        of_epoch = self._epoch(config)
        if of_epoch is None:
            raise ConfigError(
                "the number of images is unknown, as data.train cannot be opened here; add the "
                "axis images, or set data.images_per_epoch in settings"
            )
        distinct = config.data.subset_size
        num_images = sizes or (max(of_epoch, distinct or 0),)
        plan = resolve(without_auto(config), world_size=self._world_size, num_images=num_images)
        images, key = plan.stop_step * plan.batch_size, key_of(config)
        limits = (distinct, total, images)
        return PlannedRun(
            key=key,
            name=f"{label_of(draft.point)}-{key[:8]}",
            config=config,
            axes=draft.axes,
            parameters=draft.dims.backbone,
            flops_per_image=flops_of(draft.dims).total,
            images=images,
            distinct_images=min(limit for limit in limits if limit is not None),
            steps=plan.stop_step,
            rules=self.sweep.rules.model_dump(exclude_unset=True),
        )

    def _direct(self, point: Point) -> dict[str, object]:
        """Settings that an axis sets by itself."""
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
        """The number of distinct images, which the axis may give as a fraction."""
        if not isinstance(value, float):
            return value
        train = point.get("data.train", self._base.data.train)
        config = self._with_base({"data.train": train})
        sizes = self._set_sizes(config)
        if sizes is None:
            raise ConfigError(
                f"distinct_images: a fraction, {value:g}, needs the size of data.train, which "
                "cannot be opened here; give a number of images"
            )
        return max(1, round(value * sum(sizes)))

    def _below_any_peak(self, settings: Mapping[str, object]) -> dict[str, object]:
        """The settings with a final learning rate that no batch size makes too large."""
        if self._base.schedules.lr is not None:
            return dict(settings)
        return {**settings, "optim.min_lr": 0.0}

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
        """Images per epoch before rounding to whole steps; None where unknown."""
        sizes, data = self._set_sizes(config), config.data
        if config.train.steps_per_epoch is not None:
            return config.train.steps_per_epoch * config.train.batch_size
        if data.images_per_epoch is not None:
            return data.images_per_epoch
        if data.subset_size is not None or sizes is None:
            return data.subset_size
        return sum(sizes)

    def _set_sizes(self, config: RunConfig) -> tuple[int, ...] | None:
        """Images per source; None, with a note, where they cannot be opened."""
        name = config.data.sources_text
        if not config.data.sources:
            raise ConfigError("data.train: not set; name the images, in settings or in the base")
        if name not in self._sets:
            try:
                found = source_sizes(open_images(config))
                self._sets[name] = (found,) if isinstance(found, int) else tuple(found)
            except DataError as error:
                self._sets[name] = None
                self.notes.append(
                    f"data.train cannot be opened here ({error}); assumed: a run sees no image "
                    "twice, unless data.subset_size sets fewer"
                )
        return self._sets[name]

    def _require_measurable(self, config: RunConfig) -> None:
        if self.sweep.metrics.get("knn") == ONLINE and config.eval.train is None:
            raise ConfigError(
                "metrics.knn: 'online' needs labelled images; set eval.train and eval.test in "
                "settings"
            )


def _images_per_epoch(config: RunConfig, images: float) -> int:
    """Rounded down to whole steps: the run loses less than one step per epoch."""
    epochs, batch_size = config.train.epochs, config.train.batch_size
    steps = int(images / epochs) // batch_size
    if steps == 0:
        raise ConfigError(
            f"{images:,.0f} images are fewer than one step of {batch_size:,} images in each of "
            f"{epochs:,} epochs, {epochs * batch_size:,}; set fewer train.epochs in settings, or a "
            "smaller batch"
        )
    return steps * batch_size


def _with(values: Mapping[str, object], settings: Mapping[str, object]) -> dict[str, object]:
    """A nested configuration, overridden by settings with dotted keys."""
    merged: dict[str, object] = copy.deepcopy(dict(values))
    given = {key[6:]: settings[key] for key in settings if key.startswith("model.")}
    model = merged["model"]
    assert isinstance(model, dict)
    model |= dict.fromkeys(sizes_of_another(model, given))
    if settings.get("crops.mixture"):
        drop_one_size(merged)
    for dotted, value in settings.items():
        section, _, name = dotted.partition(".")
        if name:
            inner = merged[section]
            assert isinstance(inner, dict)
            inner[name] = value
        else:
            merged[section] = value
    return merged
