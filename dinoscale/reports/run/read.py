"""Read the directory of a run, which may be training, failed, damaged or a partial copy.

Files are read line by line in bounded memory, and their content is not trusted: a line that is not
a JSON object, has no step or is too long is counted and skipped.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinoscale.checkpoint.layout import STATE_FILE, checkpoints
from dinoscale.checkpoint.retention import Summary, summary
from dinoscale.config import RunConfig, parse_config
from dinoscale.config.renamed import METRICS as RENAMED
from dinoscale.config.renamed import with_new_keys
from dinoscale.config.secrets import hide_secrets
from dinoscale.config.yaml_io import read_yaml
from dinoscale.errors import ConfigError, DataError, UnreadableError
from dinoscale.reports.run.series import Series
from dinoscale.runtime.outputs import BEST_WEIGHTS

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
EVENTS, BAD_IMAGES = "events.jsonl", "bad_samples.jsonl"
NUMBERS = (
    "loss",
    "teacher_entropy",
    "kl",
    "target_mutual_information",
    "max_prototype_prob",
    "dino_loss",
    "ibot_loss",
    "patch_entropy",
    "patch_mutual_information",
    "koleo_loss",
    "koleo_distance",
    "gram_loss",
    "anchor_class_loss",
    "anchor_patch_loss",
    "class_feature_loss",
    "patch_feature_loss",
    "lr",
    "weight_decay",
    "momentum",
    "teacher_temp",
    "local_weight",
    "grad_norm",
    "center_norm",
    "images_per_s",
    "data_wait",
    "bad_samples",
    "skipped_steps",
    "peak_memory_bytes",
    "knn_top1",
    "patch_knn_top1",
    "rankme",
    "alpha_req",
    "rank_images",
    "guard_rankme",
    "guard_lidar",
    "guard_alpha_req",
    "guard_agreement",
    "save_stall_s",
    "save_write_s",
    "saved_step",
)  # in metrics.jsonl; all others are skipped
EVENTS_KEPT = 2000  # newest events
_MAX_LINE = 2**20  # bytes
_MAX_FILE = 2**20  # bytes of a file that is read as a whole
_LOG_TAIL = 2**16  # bytes
_MAX_TEXT = 900  # characters; the longest of our texts are those of collapses
_MAX_DETAILS = 20  # of an event; ours have at most five
_MAX_STEP = 10**12
_MAX_VALUE = 1e100  # larger values overflow in sums and plots, and count as infinite
_ENDED = re.compile(r"- \S+ \S+ (?:Traceback.*\n)?error: (.*)", re.DOTALL)


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl; `details` are its values except time, step and kind."""

    time: str
    step: int
    kind: str
    details: Mapping[str, str | float | None]

    def detail(self, name: str) -> str:
        """A detail as text."""
        return str(self.details.get(name, "unknown"))


@dataclass
class Events:
    """Events of a run: counts by kind, the newest, and the first and last of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    newest: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    first: dict[str, Event] = field(default_factory=dict)
    last: dict[str, Event] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Add the next event."""
        self.counts[event.kind] += 1
        self.newest.append(event)
        self.first.setdefault(event.kind, event)
        self.last[event.kind] = event


@dataclass
class Record:
    """Everything that the directory of a run tells.

    Attributes:
        run_dir: directory of the run.
        config: its configuration; None where config.yaml is missing or invalid.
        config_text: text of config.yaml, with passwords of an earlier version hidden.
        series: series of metrics.jsonl by name; empty ones have no finite value.
        not_finite: number of log lines with a non-finite loss.
        last_epoch: epoch in the last log line.
        trained_s: seconds of training, from images_per_s in the log lines; None without any.
        last_interval_s: seconds between the last two log lines, likewise.
        changed_at: last modification of metrics.jsonl, seconds since 1970; None if it is missing.
        events: events of the run.
        bad_images: number of unreadable images.
        bad_image: the first of them, with its error.
        checkpoints: checkpoints, oldest first.
        plan: plan in the newest readable checkpoint.
        versions: versions of libraries by name.
        world_size: ranks of the last start; None where unknown.
        ended_with: error at the end of the newest log file; empty without one.
        damaged: file -> number of unreadable lines.
        missing: missing or unreadable files, with the reason.
    """

    run_dir: Path
    config: RunConfig | None = None
    config_text: str = ""
    series: dict[str, Series] = field(default_factory=dict)
    not_finite: int = 0
    last_epoch: int | None = None
    trained_s: float | None = None
    last_interval_s: float = 0.0
    changed_at: float | None = None
    events: Events = field(default_factory=Events)
    bad_images: int = 0
    bad_image: str = ""
    checkpoints: list[Summary] = field(default_factory=list)
    plan: Mapping[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    world_size: int | None = None
    ended_with: str = ""
    damaged: Counter[str] = field(default_factory=Counter)
    missing: dict[str, str] = field(default_factory=dict)


def read_record(run_dir: Path) -> Record:
    """Read a run directory, changing nothing in it.

    Raises:
        DataError: it is not a run directory: it has neither config.yaml nor metrics.jsonl.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: not a folder; give the directory of a run (its run_dir)")
    if not any(_is_file(run_dir / name) for name in (CONFIG, METRICS)):
        raise DataError(
            f"{run_dir}: not the directory of a run, as it has neither {CONFIG} nor {METRICS}; give"
            " the run_dir of a training"
        )
    record = Record(run_dir, series={name: Series() for name in NUMBERS})
    _read_config(record)
    _read_metrics(record)
    for line in _objects(record, EVENTS):
        event = _event(line)
        if event is None:
            record.damaged[EVENTS] += 1
        else:
            record.events.add(event)
    for line in _objects(record, BAD_IMAGES):
        record.bad_images += 1
        record.bad_image = record.bad_image or _cut(f"{line.get('path')}: {line.get('error')}")
    try:
        found = checkpoints(run_dir)
    except UnreadableError as error:
        record.missing["checkpoints"] = str(error)
    else:
        record.checkpoints = [_checkpoint(path) for path in found if _has_number(path)]
    record.plan = _plan(record.checkpoints)
    libraries = _json_file(record, "versions.json")
    names = list(libraries)[:_MAX_DETAILS]
    record.versions = {_cut(name): _cut(str(libraries[name])) for name in names}
    record.world_size = _world_size(record)
    record.ended_with = _last_error(run_dir / "logs")
    return record


def _is_file(path: Path) -> bool:
    """Whether a path is a regular file, not a pipe or a device."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _has_number(path: Path) -> bool:
    return path.name.removeprefix("step_").isdecimal()


def _checkpoint(path: Path) -> Summary:
    """Summary of a checkpoint; its values are unknown where their types are wrong."""
    unknown = Summary(path, int(path.name.removeprefix("step_")), None, None, None, None, None)
    if not _is_file(path / STATE_FILE):
        return unknown
    found = summary(path)
    knn = found.knn_top1
    valid = isinstance(found.saved_at, str) and (knn is None or _finite(knn) is not None)
    return found if valid else unknown


def _read_config(record: Record) -> None:
    text = _text(record, CONFIG)
    if text is None:
        return
    record.config_text = str(hide_secrets(text))
    try:
        values = read_yaml(text)
        if not isinstance(values, dict):
            raise ConfigError("needs a mapping of keys to values")
        record.config = parse_config(values)
    except ConfigError as error:
        record.missing[CONFIG] = str(error)


def _read_metrics(record: Record) -> None:
    batch_size = record.config.train.batch_size if record.config else None
    before = 0  # step of the previous log line
    for stored in _objects(record, METRICS):
        line = with_new_keys(stored, RENAMED)
        step = _step(line)
        if step is None:
            record.damaged[METRICS] += 1
            continue
        for name in line.keys() & record.series.keys():
            value = _finite(line[name])
            if value is not None:
                record.series[name].add(step, value)
        if "loss" in line:
            record.not_finite += _finite(line["loss"]) is None
            record.last_epoch = _whole(line.get("epoch"))
            speed = _finite(line.get("images_per_s"))
            if batch_size and speed and speed > 0 and step > before:
                record.last_interval_s = batch_size * (step - before) / speed
                record.trained_s = (record.trained_s or 0.0) + record.last_interval_s
            before = step
    path = record.run_dir / METRICS
    if METRICS not in record.missing:
        record.changed_at = path.stat().st_mtime


def _objects(record: Record, name: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a JSON Lines file; other lines are counted as damaged."""
    path = record.run_dir / name
    if not _is_file(path):
        record.missing[name] = "is not there"
        return
    try:
        with path.open("rb") as file:
            while line := file.readline(_MAX_LINE):
                if not line.endswith(b"\n") and len(line) == _MAX_LINE:
                    _skip_line(file)
                if not line.strip():
                    continue
                found = _parsed(line)
                if found is None:
                    record.damaged[name] += 1
                else:
                    yield found
    except OSError as error:
        record.missing[name] = f"cannot be read ({error.strerror})"


def _skip_line(file: Any) -> None:
    while (rest := file.readline(_MAX_LINE)) and not rest.endswith(b"\n"):
        pass


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _finite(value: object) -> float | None:
    """A finite number or None; Python's JSON also reads NaN, and integers of any length."""
    if type(value) is float:  # most are
        return value if abs(value) < _MAX_VALUE else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < _MAX_VALUE else None


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _MAX_STEP else None  # True is an int, too


def _step(line: Mapping[str, Any]) -> int | None:
    return _whole(line.get("step"))


def _event(line: Mapping[str, Any]) -> Event | None:
    step, kind = _step(line), line.get("event")
    if step is None or not isinstance(kind, str):
        return None
    names = [name for name in line if name not in ("time", "step", "event")][:_MAX_DETAILS]
    details = {_cut(name): _detail(line[name]) for name in names}
    return Event(str(line.get("time", ""))[:40], step, kind[:40], details)


def _detail(value: object) -> str | float | None:
    """A number as it is, anything else as text short enough for a page."""
    if value is None or isinstance(value, int | float):
        return (
            value if value is None or isinstance(value, bool) else (_whole(value) or _finite(value))
        )
    return _cut(value if isinstance(value, str) else json.dumps(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 4]} ..."


def _text(record: Record, name: str) -> str | None:
    path = record.run_dir / name
    if not _is_file(path):
        record.missing[name] = "is not there"
        return None
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE + 1)
        if len(content) > _MAX_FILE:
            raise ValueError
        return content.decode()
    except OSError as error:
        record.missing[name] = f"cannot be read ({error.strerror})"
    except ValueError:  # not UTF-8, or too long
        record.missing[name] = "is not text, or too long"
    return None


def exported_name(run_dir: Path) -> str:
    """Phase or run, folder and checkpoint whose teacher the best weights are; empty if unknown."""
    name = _json_file(Record(run_dir), f"{BEST_WEIGHTS}.json").get("checkpoint")
    return name if isinstance(name, str) else ""


def _json_file(record: Record, name: str) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    text = _text(record, name)
    if text is None:
        return {}
    found = _parsed(text.encode())
    if found is None:
        record.missing[name] = "is not a JSON object"
    return found or {}


def _plan(found: list[Summary]) -> Mapping[str, Any]:
    """The whole numbers in the plan of the newest readable checkpoint, by name."""
    for checkpoint in reversed(found):
        path = checkpoint.path / STATE_FILE
        if checkpoint.saved_at is not None:
            try:
                plan = json.loads(path.read_bytes())["plan"]
                return {name: value for name, value in plan.items() if _whole(value) is not None}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
    return {}


def _world_size(record: Record) -> int | None:
    resumed = record.events.last.get("resumed")
    ranks = _whole(resumed.details.get("ranks")) if resumed else None
    if ranks is None:
        ranks = _whole(record.plan.get("world_size"))
    if ranks is None:
        settings = _json_file(record, "deepspeed.json")
        if isinstance(settings.get("student"), dict):  # older runs wrote only the student's
            settings = settings["student"]
        names = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
        )
        whole, micro, accumulated = (_whole(settings.get(name)) for name in names)
        ranks = whole // (micro * accumulated) if whole and micro and accumulated else None
    return ranks or None


def _last_error(folder: Path) -> str:
    """The error at the end of the newest log file of a rank; empty without one."""
    try:
        files = [path for path in folder.glob("rank_*.log") if _is_file(path)]
        newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            return ""
        with newest.open("rb") as file:
            file.seek(max(0, os.path.getsize(newest) - _LOG_TAIL))
            tail = file.read(_LOG_TAIL).decode(errors="replace")
    except OSError:
        return ""
    last = tail[tail.rfind("\n- ") + 1 :]  # the last line of a start or an end, and all after it
    found = _ENDED.match(last)
    return found[1].strip()[:1000] if found else ""
