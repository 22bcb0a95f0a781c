"""Apply the rules of a sweep, which scale settings with the sizes of a run."""

from __future__ import annotations

from dataclasses import dataclass

from dinoscale.config import RunConfig
from dinoscale.config.sweep.rules import Powers, RulesConfig, WarmupRule
from dinoscale.errors import ConfigError


@dataclass(frozen=True)
class Sizes:
    """The quantities that settings can scale with.

    Attributes:
        batch_size: images per step.
        width: embedding dimension.
        depth: number of blocks.
        images: images seen in training; None where unknown.
        parameters: parameters of the backbone.
    """

    batch_size: int
    width: int
    depth: int
    images: int | None
    parameters: int


def apply_rules(
    rules: RulesConfig, run: RunConfig, *, sizes: Sizes, base: Sizes, lr_factor: float
) -> dict[str, object]:
    """The settings that the rules change, by dotted key.

    Args:
        rules: rules of the sweep.
        run: the run with everything else set.
        sizes: sizes of the run.
        base: sizes of the base configuration.
        lr_factor: value of the axis `lr_factor`, 1 without it.

    Raises:
        ConfigError: a warm-up rounds to zero epochs, or a rule needs an unknown number.
    """
    settings: dict[str, object] = {}
    # The peak already grows with the batch size, as optim.lr_scaling says.
    grows = 1.0 if run.optim.lr_scaling == "linear" else 0.5
    wanted = rules.lr.batch_size if "batch_size" in rules.lr.model_fields_set else grows
    beyond = rules.lr.model_copy(update={"batch_size": wanted - grows})
    factor = _power(beyond, sizes, base, rule="lr") * lr_factor
    if factor != 1:
        settings["optim.lr"] = run.optim.lr * factor
    exponent = (sizes.batch_size / base.batch_size) ** rules.momentum.batch_size
    if exponent != 1:
        settings["dino.momentum"] = run.dino.momentum**exponent
        settings["dino.momentum_end"] = run.dino.momentum_end**exponent
    decay = _power(rules.weight_decay, sizes, base, rule="weight_decay")
    if decay != 1:
        settings["optim.weight_decay"] = run.optim.weight_decay * decay
        settings["optim.weight_decay_end"] = run.optim.weight_decay_end * decay
    if "warmup" in rules.given:
        settings["optim.warmup_epochs"] = _warmup_epochs(
            rules.warmup, epochs=run.train.epochs, images=sizes.images
        )
    return settings


def _power(powers: Powers, sizes: Sizes, base: Sizes, *, rule: str) -> float:
    """Product of all (q / q0)^e."""
    product = 1.0
    for name, exponent in powers.model_dump().items():
        if exponent == 0:
            continue
        now, then = getattr(sizes, name), getattr(base, name)
        if then is None:
            raise ConfigError(
                f"rules.{rule}.{name}: the base's number of images is unknown here; set "
                "data.images_per_epoch in settings"
            )
        product *= (now / then) ** exponent
    return product


def _warmup_epochs(rule: WarmupRule, *, epochs: int, images: int | None) -> int:
    if rule.fraction is not None:
        wanted, rule_text = rule.fraction * epochs, f"a fraction of {rule.fraction:g}"
    else:
        assert rule.images is not None
        if images is None:
            raise ConfigError(
                "rules.warmup.images: the run's number of images is unknown here; add the axis "
                "images, or set data.images_per_epoch in settings"
            )
        wanted, rule_text = rule.images / images * epochs, f"{rule.images:,} images"
    if wanted < 0.5:
        raise ConfigError(
            f"rules.warmup: {rule_text} is {wanted:.2g} of the run's {epochs} epochs, which rounds "
            "to 0; raise train.epochs in settings (the run keeps its images), or choose a longer "
            "warm-up"
        )
    return round(wanted + 1e-9)  # halves round up
