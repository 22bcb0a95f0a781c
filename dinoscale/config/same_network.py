"""Whether a phase has the tensors of the one before, by the settings that decide it."""

from typing import Any

from dinoscale.config.schema import RunConfig
from dinoscale.errors import ConfigError

_CARRIED = ("model", "head", "patch_head", "lora")  # sections that say which tensors there are
# Of these sections, but no tensor depends on them.
_MAY_CHANGE = (
    *("drop_path_rate", "drop_path_uniform", "drop_path_mode"),
    *("position_resize", "rope", "norm_eps"),
)


def require_same_network(name: str, before: RunConfig, run: RunConfig) -> None:
    """Refuse a phase with other tensors than the one before, whose weights it takes.

    Args:
        name: of the phase.
        before: the run at whose end it begins.
        run: that the phase stands for.

    Raises:
        ConfigError: a setting that decides which tensors there are differs.
    """
    then, now = _tensors(before), _tensors(run)
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"phases.{name}.{key}: {now.get(key)} here and {then.get(key)} in the phase "
                "before, whose weights this one takes; give both the same"
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
    for key in ("name", "trained_blocks"):  # whose moments, of which tensors, go on
        found[f"optim.{key}"] = getattr(config.optim, key)
    found["model.rope"] = "rotary positions" if config.model.rope else "learned positions"
    found["ibot.loss_weight"] = "a patch loss" if config.ibot.loss_weight else "none"
    found["dino.loss_weight"] = "with heads" if config.has_heads else "without heads"
    width = config.of_teacher.model.width
    found["distill"] = {key: f"a map to {width}" for key in config.distill.feature_weights}
    return found
