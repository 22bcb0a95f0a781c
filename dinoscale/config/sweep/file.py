"""The file of a sweep: what to vary, by which design, what to measure, where to run."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from dinoscale.config import renamed
from dinoscale.config.load import read_mapping
from dinoscale.config.mistakes import nearest, sections, sentences, unknown_key
from dinoscale.config.schema import RunConfig
from dinoscale.config.sections.fields import PathText, Positive, Section
from dinoscale.config.sweep.axes import KEYS_OF_AXES, AxesConfig
from dinoscale.config.sweep.executor import ExecutorConfig
from dinoscale.config.sweep.rules import KEYS_OF_RULES, RulesConfig
from dinoscale.errors import ConfigError

ONLINE = "online"  # a metric that the training itself measures
ONLINE_METRICS = ("knn", "loss")
MAX_RUNS = 10_000
_SET_BY_THE_SWEEP = ("run_dir", "resume")


class IsoFlopConfig(Section):
    """Which models are left out at a FLOP budget. Source of the defaults: [D] ours."""

    min_images: Positive = Field(
        default=1.0, description="A model that would see fewer is left out."
    )
    max_images: Positive | None = Field(
        default=None, description="A model that would see more is left out; null: none is."
    )

    @model_validator(mode="after")
    def _ordered(self) -> "IsoFlopConfig":
        if self.max_images is not None and self.max_images < self.min_images:
            raise ValueError(
                f"max_images: {self.max_images:g} is below min_images, {self.min_images:g}"
            )
        return self


class CostConfig(Section):
    """The device of the estimates. Source of the default: [D], as `dinoscale plan`."""

    gpu: str | None = Field(
        default=None, min_length=1, description="One of `dinoscale plan`, such as h100."
    )
    gpu_memory: str | None = Field(
        default=None, min_length=1, description="Of one GPU, as 40GB; null: what the named one has."
    )
    utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.4, description="Share of a GPU's published FLOP/s that a run gets."
    )
    flops_per_s: Annotated[float, Field(ge=1)] | None = Field(
        default=None, description="Instead of a GPU: FLOP/s of one rank, measured in a run."
    )

    @model_validator(mode="after")
    def _one_device(self) -> "CostConfig":
        if self.gpu is not None and self.flops_per_s is not None:
            raise ValueError("gpu: is given, and flops_per_s too; leave out one")
        if self.gpu is None and self.gpu_memory is not None:
            raise ValueError("gpu_memory: of which GPU? set cost.gpu too")
        return self


class SweepConfig(Section):
    """A sweep; `load_sweep` makes one from YAML."""

    base: PathText = Field(description="Preset or file that every run begins from.")
    settings: dict[str, object] = Field(
        default_factory=dict, description="Settings of all runs, as train.epochs: 10."
    )
    out: PathText = Field(description="Folder of all that the sweep writes.")
    design: Literal["grid", "list", "isoflop"] = Field(
        default="grid",
        description="grid: all combinations of the axes. list: the runs under `runs`. isoflop: for "
        "each budget every model, on as many images as it leaves.",
    )
    axes: AxesConfig = Field(default_factory=lambda: AxesConfig.model_validate({}))
    runs: Annotated[tuple[AxesConfig, ...], Field(strict=False)] = Field(
        default=(), description="Of the design list: in each run one value by name of an axis."
    )
    isoflop: IsoFlopConfig = Field(default_factory=IsoFlopConfig)
    rules: RulesConfig = Field(default_factory=RulesConfig)
    metrics: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        description="What to measure, by name: 'online' for knn and loss, which the training "
        "measures, or a line of `dinoscale evaluate` without WEIGHTS.",
    )
    executor: ExecutorConfig = Field(default_factory=ExecutorConfig)
    cost: CostConfig = Field(default_factory=CostConfig)

    @field_validator("runs", mode="before")
    @classmethod
    def _axes_of_one_value(cls, runs: object) -> object:
        """A run is one point: each axis has one value."""
        if not isinstance(runs, list):
            return runs
        return [
            {name: [value] for name, value in run.items()} if isinstance(run, dict) else run
            for run in runs
        ]

    @model_validator(mode="after")
    def _agrees(self) -> "SweepConfig":
        mistakes = [
            *self._wrong_settings(),
            *self._wrong_design(),
            *self._wrong_axes(),
            *self._wrong_metrics(),
        ]
        if mistakes:
            raise ValueError("\n".join(dict.fromkeys(mistakes)))
        return self

    @property
    def all_axes(self) -> list[tuple[str, AxesConfig]]:
        """The axes that are multiplied out, each with its place in the file."""
        if self.design != "list":
            return [("axes", self.axes)]
        return [(f"runs, item {number}", run) for number, run in enumerate(self.runs, start=1)]

    def _wrong_settings(self) -> Iterator[str]:
        for key, value in self.settings.items():
            if key in sections() or isinstance(value, dict):
                yield f"settings.{key}: is a section; write dotted keys, as train.epochs: 10"
            else:
                yield from _wrong_key(f"settings.{key}", key)

    def _wrong_design(self) -> Iterator[str]:
        axes, design = self.axes.by_name(), self.design
        if design == "list":
            if axes:
                yield "axes: the design 'list' has none; write their values into `runs`"
            if not self.runs:
                yield "runs: is empty; the design 'list' needs at least one run"
        else:
            if self.runs:
                yield f"runs: only for the design 'list', not {design!r}"
            if not axes:
                yield "axes: is empty; name what to vary, as `model: [tiny, small]`"
        if design == "isoflop":
            for name in ("model", "flops"):
                if name not in axes:
                    yield f"axes.{name}: is missing; the design 'isoflop' needs it"
        elif "isoflop" in self.model_fields_set:
            yield f"isoflop: only for the design 'isoflop', not {design!r}"
        points = sum(axes.num_points for _, axes in self.all_axes)
        if points > MAX_RUNS:
            yield f"axes: make {points:,} runs, more than {MAX_RUNS:,}; leave out values"

    def _wrong_axes(self) -> Iterator[str]:
        for place, axes in self.all_axes:
            separator = "." if place == "axes" else ": "
            names = list(axes.by_name())
            if not names and place != "axes":
                yield f"{place}: is empty; name at least one axis"
            owners: dict[str, str] = dict.fromkeys(self.settings, "settings.{key}")
            for name in names:
                where = f"{place}{separator}{name}"
                if name not in KEYS_OF_AXES:
                    yield from _wrong_key(where, name)
                yield from self._wrong_rules(where, name)
                for key in KEYS_OF_AXES.get(name, (name,)):
                    if key in owners:
                        other = owners[key].format(key=key)
                        yield f"{where}: decides {key}, and so does {other}; leave out one"
                    owners[key] = where
            if "lr_factor" in names and "optim.lr" in owners and "optim.lr" not in self.settings:
                yield (
                    f"{place}{separator}lr_factor: multiplies what the rules give, but "
                    f"{owners['optim.lr']} sets the learning rate; leave out one"
                )

    def _wrong_rules(self, where: str, name: str) -> Iterator[str]:
        for rule, keys in KEYS_OF_RULES.items():
            if rule in self.rules.given and set(keys) & set(KEYS_OF_AXES.get(name, (name,))):
                instead = ", or vary lr_factor instead" if rule == "lr" else ""
                yield f"{where}: rules.{rule} decides it too; leave out one{instead}"

    def _wrong_metrics(self) -> Iterator[str]:
        if "warmup" in self.rules.given and "optim.warmup_epochs" in self.settings:
            yield "settings.optim.warmup_epochs: rules.warmup decides it too; leave out one"
        if not self.metrics:
            yield "metrics: is empty; name what to measure, as `knn: online`"
        for name, how in self.metrics.items():
            if not name.isidentifier():
                yield f"metrics: {name!r} cannot be a name; use letters, digits and '_'"
            if how == ONLINE and name not in ONLINE_METRICS:
                yield (
                    f"metrics.{name}: only {' and '.join(ONLINE_METRICS)} are measured online; "
                    'write a line of `dinoscale evaluate`, as "knn --train DIR --test DIR"'
                )
            try:
                shlex.split(how)
            except ValueError as error:
                yield f"metrics.{name}: is no command line ({error})"


def _wrong_key(where: str, key: str) -> Iterator[str]:
    """What is wrong with the name of a setting, as axis or for all runs."""
    names = key.split(".")
    if key in _SET_BY_THE_SWEEP:
        yield f"{where}: is set by the sweep itself, under `out`"
    elif key in sections():
        yield f"{where}: is a section; name one of its settings, as head.num_prototypes"
    elif len(names) == 1 and key not in RunConfig.model_fields and where.startswith("settings"):
        yield f"{where}: {unknown_key(names)}"
    elif len(names) == 1 and key in renamed.AXES:
        yield f"{where}: renamed, write {renamed.AXES[key]}"
    elif len(names) == 1 and key != "seed":
        yield (
            f"{where}: unknown axis{nearest(key, KEYS_OF_AXES)}; known are "
            f"{', '.join(KEYS_OF_AXES)}, and settings such as head.num_prototypes"
        )
    elif len(names) > 1:
        section = sections().get(names[0])
        if section is None:
            near = nearest(names[0], sections())
            yield f"{where}: unknown section {names[0]!r}{near}; known are {', '.join(sections())}"
        elif len(names) > 2 or names[1] not in section.model_fields:
            yield f"{where}: {unknown_key(names[:2])}"


def load_sweep(path: Path) -> SweepConfig:
    """Load the file of a sweep.

    A `base` that is a file is looked for beside it first; `out` is relative to the working
    directory.

    Raises:
        ConfigError: something is missing, unknown, of the wrong type or in contradiction; the
            message has one line per mistake.
    """
    values = read_mapping(path)
    base = values.get("base")
    if isinstance(base, str) and "\0" not in base and (path.parent / base).is_file():
        values["base"] = str(path.parent / base)
    try:
        return SweepConfig.model_validate(values)
    except ValidationError as error:
        told = sentences(error.errors(), SweepConfig)
        raise ConfigError("\n".join(f"{path}: {sentence}" for _, sentence in told)) from None
