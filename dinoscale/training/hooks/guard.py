"""The guard's verdict: whether the teacher has fallen, and what to turn; no files, no ranks.

The first measurement is the start. A later one is a fall if `measure` is more than the fraction
`max_fall` below its best so far, the start included; if less than `min_agreement` of the
neighbours are those of the start; or if the features are all zero or not finite. A fall never
becomes the best. A measure that could not be taken is not judged.
"""

from dataclasses import replace

from dinoscale.checkpoint.progress import Guarded
from dinoscale.config import RunConfig
from dinoscale.config.sections.guard import GuardConfig
from dinoscale.config.sections.training import CurveConfig
from dinoscale.training.hooks.setting_names import as_set_here

_WORDS = {"rankme": "RankMe", "lidar": "LiDAR", "knn_top1": "k-NN top-1"}
_UNUSABLE = "its features are all zero or not finite"


def judge(
    before: Guarded | None,
    rule: GuardConfig,
    *,
    step: int,
    values: dict[str, float],
    images: str,
    identity: str = "",
) -> Guarded:
    """What is known after a measurement; its `fall` says what is wrong, if anything.

    Args:
        before: what was known; None, or of other images: this measurement is the start.
        rule: margins and measure.
        step: after which it was measured.
        values: numbers by name.
        images: which ones were measured, in words.
        identity: digest of them.
    """
    if starts(before, images, identity):
        fall = "" if values["rankme"] else _UNUSABLE
        return Guarded(
            images, rule.measure, step, values, step, values, step, values, fall, identity
        )
    assert before is not None
    before = _by_measure(_of_views(before, rule.measure, values), rule.measure)
    fall = _fall(before, rule, values)
    after = replace(
        before,
        images=images,
        identity=identity,
        measure=rule.measure,
        step=step,
        values=values,
        fall=fall,
    )
    value = values.get(rule.measure)
    if value is not None and not fall and value >= before.best.get(rule.measure, value):
        return replace(after, best_step=step, best=values, best_in="")
    return after


def _of_views(before: Guarded, measure: str, values: dict[str, float]) -> Guarded:
    """Without LiDAR of other views than that of `values`, with which it does not compare.

    Where LiDAR decides, its views are in the identity. Older versions did not store them.
    """
    views = values.get("lidar_views")
    if views is None or measure == "lidar":
        return before

    def kept(known: dict[str, float]) -> dict[str, float]:
        if known.get("lidar_views") == views:
            return known
        return {name: known[name] for name in known if name not in ("lidar", "lidar_views")}

    return replace(before, start=kept(before.start), best=kept(before.best))


def _by_measure(before: Guarded, measure: str) -> Guarded:
    """With the best by this measure of what is known, in place of the best by another."""
    if before.measure == measure:
        return before
    known = [
        (before.start_step, before.start, before.start_in),
        (before.best_step, before.best, before.best_in),
    ]
    if not before.fall and before.step >= 0:
        known.append((before.step, before.values, ""))
    measured = [one for one in known if measure in one[1]]
    if not measured:
        return before
    step, values, folder = max(measured, key=lambda one: one[1][measure])
    return replace(before, best_step=step, best=values, best_in=folder)


def starts(before: Guarded | None, images: str, identity: str = "") -> bool:
    """Whether the next measurement is the start."""
    return before is None or not before.is_of(images=images, identity=identity)


def new_start_text(before: Guarded, *, step: int, images: str) -> str:
    """Why the guard begins anew in the middle of a run."""
    which = "others, or otherwise shown or classified" if before.images == images else before.images
    return (
        f"step {step}: the guard measures {images}; its numbers so far are of"
        f" other images ({which}) and do not compare. The teacher of this step is the new start,"
        f" whatever has become of it; the former best, {before.best_text}, is kept"
    )


def _fall(before: Guarded, rule: GuardConfig, values: dict[str, float]) -> str:
    if not values["rankme"]:
        return _UNUSABLE
    value, best = values.get(rule.measure), before.best.get(rule.measure)
    if value is not None and best is not None and value < (1 - rule.max_fall) * best:
        return (
            f"its {_WORDS[rule.measure]} is {value:.4g}, {1 - value / best:.0%} below the best so"
            f" far, {best:.4g} at {before.best_text} (guard.max_fall {rule.max_fall:g})"
        )
    shared = values.get("agreement")
    if shared is not None and shared < rule.min_agreement:
        return (
            f"it shares {shared:.0%} of the nearest neighbours with the start,"
            f" {before.start_text} (guard.min_agreement {rule.min_agreement:g})"
        )
    return ""


def fall_text(guarded: Guarded, config: RunConfig) -> str:
    """A fall in words, with the settings to change."""
    curves = config.schedules.curves
    rate = _curve_text(curves["lr"]) if "lr" in curves else f"{config.optim.lr:g}"
    momentum = (
        _curve_text(curves["momentum"]) if "momentum" in curves else f"{config.dino.momentum:g}"
    )
    text = (
        f"step {guarded.step}: the teacher has fallen: {guarded.fall}. Lower optim.lr (now"
        f" {rate}), of the backbone alone optim.backbone_lr or optim.layer_decay (now"
        f" {config.optim.layer_decay:g}), raise dino.momentum (now {momentum}) or"
        f" optim.warmup_epochs, or make the run shorter (train.epochs {config.train.epochs})"
    )
    return as_set_here(text, config)


def _curve_text(curve: CurveConfig) -> str:
    return " to ".join(f"{value:g}" for value in curve.reached)


def end_text(guarded: Guarded, rule: GuardConfig, *, best_step: int | None) -> str:
    """What to do after a fall that ends the run.

    Args:
        guarded: the fall.
        rule: says how it ends.
        best_step: of the best checkpoint; None if there is none.
    """
    if best_step is None:
        return f"No checkpoint is better; set guard.on_fall=warn to go on from step {guarded.step}"
    if rule.on_fall == "stop":
        return (
            f"Nothing is undone (guard.on_fall=stop): the same command stops here again."
            f" guard.on_fall=roll_back returns to the best checkpoint, step {best_step};"
            f" guard.on_fall=warn goes on from step {guarded.step}"
        )
    return (
        f"Checkpoints after the best, step {best_step}, are set aside as fallen_step_*"
        " (guard.on_fall=roll_back): the same command goes on from there, and falls again unless a"
        " setting is changed"
    )
