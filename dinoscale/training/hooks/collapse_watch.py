"""Watch the targets of every kind of token for a collapse, from numbers that all ranks have."""

import logging

from dinoscale.config import RunConfig
from dinoscale.config.resolve import RunPlan
from dinoscale.engine.schedules import StepValues
from dinoscale.engine.step import StepMetrics
from dinoscale.errors import RunFailedError
from dinoscale.training.hooks.collapse import Alarm, CollapseMonitor, Reading
from dinoscale.training.hooks.events import Events
from dinoscale.training.hooks.setting_names import as_set_here

log = logging.getLogger(__name__)


class CollapseWatch:
    """A monitor for each kind of token that has targets: class tokens, and masked patches."""

    def __init__(self, config: RunConfig, plan: RunPlan, events: Events, *, warns: bool) -> None:
        """Watch a run; `warns` on the rank that logs warnings."""
        self._config, self._events, self._warns = config, events, warns
        heads = {"class": config.head} if config.has_heads else {}
        if config.ibot.loss_weight:
            heads["patch"] = config.patch_head or config.head
        self._monitors = {
            kind: CollapseMonitor(
                num_prototypes=head.num_prototypes,
                student_temp=config.dino.student_temp,
                center_momentum=config.dino.center_momentum,
                warmup_steps=plan.warmup_steps,
                freeze_steps=plan.freeze_last_layer_steps,
                tokens=f"{kind} tokens" if len(heads) > 1 else "",
            )
            for kind, head in heads.items()
        }

    def read(self, now: StepValues, result: StepMetrics) -> dict[str, Reading]:
        """The targets of each kind of token; nothing without heads."""
        if not self._monitors:
            return {}
        readings = {
            "class": Reading(
                loss=result.teacher_entropy + result.kl,
                teacher_entropy=result.teacher_entropy,
                mean_target_entropy=result.mean_target_entropy,
                share=result.max_prototype_prob,
                teacher_temp=now.teacher_temp,
            )
        }
        if "patch" in self._monitors:
            readings["patch"] = Reading(
                # The loss is a mean over all global crops, of which this share is masked.
                loss=result.terms["ibot_loss"] / self._config.ibot.masked_share,
                teacher_entropy=result.terms["patch_entropy"],
                mean_target_entropy=result.mean_patch_target_entropy,
                share=result.max_patch_prototype_prob,
                teacher_temp=now.teacher_temp,
            )
        return readings

    def observe(self, done: int, readings: dict[str, Reading]) -> None:
        """Warn of a collapse, or end the run; all ranks see the same values.

        Raises:
            RunFailedError: on every rank, at a collapse with train.stop_on_collapse.
        """
        for kind, reading in readings.items():
            alarm = self._monitors[kind].observe(done, reading)
            if alarm is not None:
                self._raise(done, alarm)

    def _raise(self, done: int, alarm: Alarm) -> None:
        text = as_set_here(alarm.text, self._config)
        self._events.write(done, "collapse", kind=alarm.kind, text=text)
        if self._config.train.stop_on_collapse:
            raise RunFailedError(f"step {done}: {text} (train.stop_on_collapse)")
        if self._warns:
            log.warning("step %d: %s", done, text)
