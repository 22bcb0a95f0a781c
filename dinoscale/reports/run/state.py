"""Progress of a run and whether it is still training, as numbers and as sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dinoscale.cluster.doctor.report import count_text
from dinoscale.config import count_parameters
from dinoscale.reports.run.read import CONFIG, METRICS, Record

How = Literal["finished", "training", "asked to stop", "failed", "silent", "not begun"]

_SILENT_S = 600.0  # without a log line after which a run counts as ended; k-NN takes minutes
_INTERVALS = 10  # the same in intervals between log lines, if that is longer


@dataclass(frozen=True)
class State:
    """Progress of a run.

    Attributes:
        how: what the run is doing, or how it ended; "silent" if it stopped writing without an end.
        step: optimizer steps done, by the log.
        stop_step: step at which it ends; None where unknown.
        steps_per_epoch: steps per epoch; None where unknown.
        reason: reason of an end before the last step; empty without one.
        age_s: seconds since the last log line; None without a log.
    """

    how: How
    step: int
    stop_step: int | None
    steps_per_epoch: int | None
    reason: str
    age_s: float | None


def find_state(record: Record, *, now: float) -> State:
    """Derive the state of a run from its files.

    Args:
        record: record of the run.
        now: current time, seconds since 1970.
    """
    step = max((series.last.step for series in record.series.values() if series.last), default=0)
    per_epoch = _steps_per_epoch(record)
    stop = _stop_step(record, per_epoch)
    age_s = None if record.changed_at is None else max(0.0, now - record.changed_at)
    how, reason = _how(record, step=step, stop=stop, age_s=age_s)
    return State(how, step, stop, per_epoch, reason, age_s)


def _steps_per_epoch(record: Record) -> int | None:
    planned = record.plan.get("steps_per_epoch")
    if planned:
        return int(planned)
    config = record.config
    if config is None:
        return None
    if config.train.steps_per_epoch is not None:
        return config.train.steps_per_epoch
    if config.data.images_per_epoch is not None:
        return config.data.images_per_epoch // config.train.batch_size or None
    return _from_momentum(record)


def _from_momentum(record: Record) -> int | None:
    """Steps per epoch from the last logged momentum, which follows a cosine over all steps."""
    config, last = record.config, record.series["momentum"].last
    if config is None or last is None or config.dino.momentum == config.dino.momentum_end:
        return None
    if config.schedules.momentum is not None or config.schedules.cosine_extra:
        return None
    step = last.step - 1  # counted from 0
    start, end = config.dino.momentum, config.dino.momentum_end
    cosine = 2 * (last.value - end) / (start - end) - 1
    if step < 1 or not -1 < cosine < 1:
        return None
    per_epoch = round(math.pi * step / math.acos(cosine) / config.train.epochs)
    agrees = per_epoch > 0 and step // per_epoch == record.last_epoch
    return per_epoch if agrees else None


def _stop_step(record: Record, per_epoch: int | None) -> int | None:
    if record.config is None:
        stop = record.plan.get("stop_step")
        return None if stop is None else int(stop)
    train = record.config.train  # may have changed since the checkpoint
    ends = [] if per_epoch is None else [train.epochs * per_epoch]
    if train.stop_after_steps is not None and ends:
        ends.append(train.stop_after_steps)
    return min(ends, default=None)


def _how(record: Record, *, step: int, stop: int | None, age_s: float | None) -> tuple[How, str]:
    """What the run is doing or how it ended, and the reason of an early end."""
    fallen = _end_at_fall(record, step)
    if fallen:
        return "failed", fallen
    if stop is not None and step >= stop and _is_saved(record, stop):
        return "finished", ""
    if record.ended_with:
        return "failed", record.ended_with
    ends = [e for e in record.events.newest if e.kind in ("preempted", "stopped", "resumed")]
    if ends and ends[-1].kind != "resumed" and ends[-1].step >= step:
        reason = ends[-1].detail("reason")
        return ("asked to stop" if ends[-1].kind == "preempted" else "failed"), reason
    if age_s is None:
        return "not begun", ""
    if age_s <= max(_SILENT_S, _INTERVALS * record.last_interval_s):
        return "training", ""
    return "silent", ""


def _end_at_fall(record: Record, step: int) -> str:
    """Why the guard ended the last start, at its last step; empty if it did not."""
    kinds = ("stopped", "rolled back", "resumed")
    last = next((e for e in reversed(record.events.newest) if e.kind in kinds), None)
    if last is None or last.kind == "resumed" or last.step < step:
        return ""
    return last.detail("reason")  # a return after non-finite steps has none, and goes on


def _is_saved(record: Record, stop: int) -> bool:
    saved = record.series["saved_step"].highest
    if saved is None:  # an old log, or a copy without checkpoints: rely on the last log line
        return True
    return saved.value >= stop or any(found.step >= stop for found in record.checkpoints)


def describe_run(record: Record, state: State) -> list[str]:
    """Sentences on what was trained, how far, how fast, and how well."""
    return [_what(record), _how_far(record, state), *_how_fast(record, state), *_how_good(record)]


def _what(record: Record) -> str:
    config = record.config
    if config is None:
        return f"Model and data are unknown: {CONFIG} {record.missing.get(CONFIG, '')}."
    counts = count_parameters(config)
    size = "" if counts.backbone is None else f" ({counts.backbone / 1e6:.3g} M parameters"
    if size:
        beside = "a head" if config.has_heads else "maps to the teacher's features"
        head = "" if counts.head is None else f" and {beside} of {counts.head / 1e6:.3g} M"
        size += f"{head})"
    images = record.plan.get("num_images")
    data = config.data.sources_text if config.data.sources else "no images"
    ranks = "" if record.world_size is None else f" on {count_text(record.world_size, 'rank')}"
    return (
        f"{config.model.backbone}{size}, trained on {data}"
        f"{f' ({images:,} images)' if images else ''}, {config.train.batch_size:,} images per step"
        f"{ranks}, {config.engine.precision}, ZeRO stage {config.engine.zero_stage}."
    )


def _how_far(record: Record, state: State) -> str:
    of = "" if state.stop_step is None else f" of {state.stop_step:,}"
    far = f"{state.step:,}{of} steps"
    if state.steps_per_epoch:
        far += f", {state.step / state.steps_per_epoch:.3g} epochs"
    if record.config is not None:
        far += f", {state.step * record.config.train.batch_size:,} images"
    age = "" if state.age_s is None else duration_text(state.age_s)
    if state.how == "not begun":
        return f"No step has been logged: {METRICS} {record.missing.get(METRICS, 'is empty')}."
    return {
        "finished": f"Finished: {far}.",
        "training": f"Still training: {far}; last log line {age} ago.",
        "asked to stop": f"Asked to stop ({state.reason}) and saved after {far}; the same command"
        " resumes from there.",
        "failed": f"Ended with an error after {far}: {state.reason}",
        "silent": f"Not finished: {far}, and nothing written for {age}: it was killed or hangs. See"
        " `logs/`; the same command resumes from the newest checkpoint.",
    }[state.how]


def _how_fast(record: Record, state: State) -> list[str]:
    speed = record.series["images_per_s"]
    if speed.last is None:
        return []
    text = f"{_typical(record, 'images_per_s'):.4g} images/s (median)"
    if record.trained_s is None:
        return [f"Throughput: {text}."]
    text = f"Trained for {duration_text(record.trained_s)} at {text}."
    left = (state.stop_step or 0) - state.step
    if state.how == "training" and left > 0 and state.step:
        remaining = duration_text(left * record.trained_s / state.step)
        text += f" Time left at this speed: {remaining}."
    return [text]


def _typical(record: Record, name: str) -> float:
    return median([point.value for point in record.series[name].means()])


def median(values: list[float]) -> float:
    """The middle value, or the upper of the two middle ones; needs at least one value."""
    return sorted(values)[len(values) // 2]


def _how_good(record: Record) -> list[str]:
    knn, loss = record.series["knn_top1"], record.series["loss"]
    sentences = []
    if knn.last is not None and knn.highest is not None:
        sentences.append(
            f"k-NN top-1 of the teacher: {knn.last.value:.1f} % at step {knn.last.step:,}; best:"
            f" {knn.highest.value:.1f} % at step {knn.highest.step:,}."
        )
    if loss.last is not None:
        sentences.append(f"Last loss: {loss.last.value:.4g} nats.")
    return sentences


def duration_text(seconds: float) -> str:
    """A duration in the largest fitting unit: `45 s`, `12.0 min`, `3.4 h`, `2.1 days`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
