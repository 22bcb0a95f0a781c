"""The phases of a run, each a run of its own that begins where the one before ended."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dinoscale.config.layers import Layers
from dinoscale.config.mistakes import sentences
from dinoscale.config.schema import RunConfig
from dinoscale.config.training import PhaseConfig
from dinoscale.errors import ConfigError
from dinoscale.runtime.outputs import PHASES

_CARRIED = ("model", "head", "patch_head")  # sections that say which tensors there are
# Of these sections, but no tensor depends on them.
_MAY_CHANGE = (
    *("drop_path_rate", "drop_path_uniform", "drop_path_mode"),
    *("position_resize", "rope", "norm_eps"),
)


def phases_of(config: RunConfig) -> tuple[RunConfig, ...]:
    """The runs that a configuration stands for, in the order in which they are trained.

    A phase has the settings of the file with its own changes, its own folder in run_dir, and
    another seed, so that it sees the images in another order.

    Returns:
        One configuration for each phase, without phases; of a run without phases, itself.

    Raises:
        ConfigError: a phase has settings that a run cannot have, or a network that is not that of
            the phase before.
    """
    if not config.phases:
        return (config,)
    found: list[RunConfig] = []
    for number, phase in enumerate(config.phases):
        found.append(_run_of(config, number, phase, before=found[-1] if found else None))
    return tuple(found)


def phase_named(config: RunConfig, name: str) -> RunConfig:
    """The run that a phase stands for.

    Raises:
        ConfigError: there is no such phase.
    """
    names = [phase.name for phase in config.phases]
    if name not in names:
        known = f"phases are {', '.join(names)}" if names else "the run has no phases"
        raise ConfigError(f"phase: {name!r} is not one; {known}")
    return phases_of(config)[names.index(name)]


def _run_of(
    config: RunConfig, number: int, phase: PhaseConfig, *, before: RunConfig | None
) -> RunConfig:
    _refuse_beginnings(phase, later=before is not None)
    of_place: dict[str, object] = {
        "run_dir": str(Path(config.run_dir) / PHASES / f"{number + 1:02d}_{phase.name}"),
        "seed": (config.seed + number) % 2**32,
    }
    merged = Layers()
    for values in (
        config.model_dump(exclude={"phases", "phase"}),
        of_place,
        phase.change,
        _beginning(phase, before),
    ):
        merged.put(values, origin="")
    try:
        run = RunConfig.model_validate(merged.values)
    except ValidationError as error:
        lines = [f"phases.{phase.name}.{text}" for _, text in sentences(error.errors())]
        raise ConfigError("\n".join(lines)) from None
    if before is not None:
        _require_same_network(phase.name, before, run)
        _require_gram_network(phase, before, run)
    return run


def _refuse_beginnings(phase: PhaseConfig, *, later: bool) -> None:
    """Refuse what a phase cannot choose: where it is written, and where it begins."""
    train = phase.change.get("train")
    given = {f"train.{key}" for key in train} if isinstance(train, dict) else set()
    given |= phase.change.keys()
    refused = ["run_dir", "phases", "phase"]
    if later:
        refused += ["train.init_from", "train.init_head", "train.continue_from"]
    for key in refused:
        if key in given:
            remedy = "begins where the one before ended" if "train." in key else "has its own"
            raise ConfigError(f"phases.{phase.name}.{key}: a phase {remedy}; leave it out")


def _beginning(phase: PhaseConfig, before: RunConfig | None) -> dict[str, dict[str, object]]:
    if before is None:
        return {}
    everything = phase.start == "everything"
    return {
        "train": {
            "continue_from": before.run_dir if everything else None,
            "init_from": None if everything else before.run_dir,
            "init_head": not everything,
        }
    }


def _require_same_network(name: str, before: RunConfig, run: RunConfig) -> None:
    """Refuse a phase with other tensors than the one before, whose weights it takes."""
    then, now = _tensors(before), _tensors(run)
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"phases.{name}.{key}: {now.get(key)} here and {then.get(key)} in the phase "
                "before, whose weights this one takes; give both the same"
            )


def _require_gram_network(phase: PhaseConfig, before: RunConfig, run: RunConfig) -> None:
    """Refuse a Gram loss that would take over the Gram network of a phase that has none."""
    if not run.gram.loss_weight or run.gram.steps_without is not None or before.gram.loss_weight:
        return
    raise ConfigError(
        f"phases.{phase.name}.gram.teacher: the phase before has no Gram network to go on with "
        "(gram.loss_weight=0); give weights, or let the EMA teacher be taken over with "
        "gram.refresh_every_steps"
    )


def _tensors(config: RunConfig) -> dict[str, Any]:
    """Settings by dotted key that decide which tensors the networks have."""
    found: dict[str, Any] = {"data.channels": config.data.channels}
    for section in _CARRIED:
        values = getattr(config, section)
        if values is None:
            found[section] = None
            continue
        found |= {
            f"{section}.{key}": value
            for key, value in values.model_dump().items()
            if key not in _MAY_CHANGE
        }
    found["optim.name"] = config.optim.name  # whose moments go on
    found["model.rope"] = "rotary positions" if config.model.rope else "learned positions"
    found["ibot.loss_weight"] = "a patch loss" if config.ibot.loss_weight else "none"
    return found
