"""Apply the rules of a sweep: settings of a run that follow from its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from dinoscale.config import RunConfig
from dinoscale.config.sweep.rules import Powers, RulesConfig, WarmupRule
from dinoscale.errors import ConfigError


@dataclass(frozen=True)
class Sizes:
    """What settings can scale with.

    Attributes:
        batch_size: images of a step.
        width: of a token.
        depth: blocks.
        images: images seen in the training; None where it is not known.
        parameters: scalars of the backbone.
    """

    batch_size: int
    width: int
    depth: int
    images: int | None
    parameters: int


def ruled_settings(
    rules: RulesConfig, run: RunConfig, *, sizes: Sizes, base: Sizes, lr_factor: float
) -> dict[str, object]:
    """Settings by dotted key that the rules give.

    Args:
        rules: of the sweep.
        run: with everything else set.
        sizes: of the run.
        base: of the base configuration.
        lr_factor: of the axis, 1 without it.

    Raises:
        ConfigError: a warm-up is no whole epoch, or a rule needs a number that is not known.
    """
    settings: dict[str, object] = {}
    # optim.lr counts for 256 images, which makes the peak linear in the batch already.
    beyond_linear = rules.lr.model_copy(update={"batch_size": rules.lr.batch_size - 1})
    factor = _power(beyond_linear, sizes, base, rule="lr") * lr_factor
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
                f"rules.{rule}.{name}: the base's number of images is not known here; set "
                "data.images_per_epoch in settings"
            )
        product *= (now / then) ** exponent
    return product


def _warmup_epochs(rule: WarmupRule, *, epochs: int, images: int | None) -> int:
    if rule.fraction is not None:
        wanted, words = rule.fraction * epochs, f"a fraction of {rule.fraction:g}"
    else:
        assert rule.images is not None
        if images is None:
            raise ConfigError(
                "rules.warmup.images: the run's number of images is not known here; add the axis "
                "images, or set data.images_per_epoch in settings"
            )
        wanted, words = rule.images / images * epochs, f"{rule.images:,} images"
    if wanted < 0.5:
        raise ConfigError(
            f"rules.warmup: {words} is {wanted:.2g} of the run's {epochs} epochs, which rounds to "
            "none; raise train.epochs in settings (the run keeps its images), or take a longer "
            "warm-up"
        )
    return round(wanted + 1e-9)  # a half is rounded up
