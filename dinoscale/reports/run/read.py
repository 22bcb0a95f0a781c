"""Reads the directory of a run that may still train, has failed, or is damaged or a partial copy.

Files are read line by line in bounded memory. Nothing in them is believed: a line that is no JSON
object, has no step or is endless is counted and passed over.
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

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
EVENTS, BAD_IMAGES = "events.jsonl", "bad_samples.jsonl"
NUMBERS = (
    "loss",
    "teacher_entropy",
    "kl",
    "target_mutual_information",
    "max_prototype_prob",
    "lr",
    "weight_decay",
    "momentum",
    "teacher_temp",
    "grad_norm",
    "center_norm",
    "images_per_s",
    "data_wait",
    "bad_samples",
    "skipped_steps",
    "peak_memory_bytes",
    "knn_top1",
    "save_stall_s",
    "save_write_s",
    "saved_step",
)  # of metrics.jsonl, all others are passed over
EVENTS_KEPT = 2000  # the newest
_LINE = 2**20  # bytes, at most
_FILE = 2**20  # bytes of a file that is read as a whole, at most
_LOG_TAIL = 2**16  # bytes
_TOLD = 900  # characters of a text; the longest of ours are the collapses'
_DETAILS = 20  # of an event; ours have at most five
_MAX_STEP = 10**12
_LARGEST = 1e100  # what is above it overflows in sums and plots, and is as good as infinite
_ENDED = re.compile(r"- \S+ \S+ (?:Traceback.*\n)?error: (.*)", re.DOTALL)


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl; `details` are all its values but the first three."""

    time: str
    step: int
    kind: str
    details: Mapping[str, str | float | None]

    def told(self, name: str) -> str:
        """One of the details as text for a sentence."""
        return str(self.details.get(name, "unknown"))


@dataclass
class Events:
    """What happened: counts of all, the newest, and of each kind the first and the last."""

    counts: Counter[str] = field(default_factory=Counter)
    newest: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    first: dict[str, Event] = field(default_factory=dict)
    last: dict[str, Event] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Take the next one."""
        self.counts[event.kind] += 1
        self.newest.append(event)
        self.first.setdefault(event.kind, event)
        self.last[event.kind] = event


@dataclass
class Record:
    """All that is known of a run.

    Attributes:
        run_dir: its directory.
        config: as it trained; None where config.yaml is missing or cannot be read.
        config_text: config.yaml as it is, but for passwords of an earlier version.
        series: of metrics.jsonl, by name; those without a finite value are empty.
        not_finite: log lines whose loss is no finite number.
        last_epoch: of the last log line that tells it.
        trained_s: seconds of training, from images_per_s of the log lines; None without any.
        last_interval_s: seconds between the last two log lines, alike.
        changed_at: when metrics.jsonl was last written, seconds since 1970; None if it is missing.
        events: what happened.
        bad_images: unreadable files, counted, and one of them with its error.
        checkpoints: oldest first.
        plan: of the newest checkpoint that tells it.
        versions: of libraries, by name.
        world_size: ranks of the last start; None where unknown.
        ended_with: the error that a log file ends with; empty without one.
        damaged: file -> lines that could not be read.
        missing: files that are not there, or cannot be read, with the reason.
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
    """Read a run directory; nothing in it is changed.

    Raises:
        DataError: it is none, that is, it has neither config.yaml nor metrics.jsonl.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: is no folder; give the directory of a run (its run_dir)")
    if not any(_is_file(run_dir / name) for name in (CONFIG, METRICS)):
        raise DataError(
            f"{run_dir}: has neither {CONFIG} nor {METRICS}, so it is no run; give the run_dir of a"
            " training"
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
    names = list(libraries)[:_DETAILS]
    record.versions = {_cut(name): _cut(str(libraries[name])) for name in names}
    record.world_size = _world_size(record)
    record.ended_with = _last_error(run_dir / "logs")
    return record


def _is_file(path: Path) -> bool:
    """Whether a file can be read to its end: no pipe, no device."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _has_number(path: Path) -> bool:
    return path.name.removeprefix("step_").isdecimal()


def _checkpoint(path: Path) -> Summary:
    """What a checkpoint says of itself, if that has the types it should have."""
    unknown = Summary(path, int(path.name.removeprefix("step_")), None, None, None, None, None)
    if not _is_file(path / STATE_FILE):
        return unknown
    found = summary(path)
    knn = found.knn_top1
    fits = isinstance(found.saved_at, str) and (knn is None or _finite(knn) is not None)
    return found if fits else unknown


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
    before = 0  # step of the log line before
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
    """The JSON objects of a file with one a line; other lines are counted as damaged."""
    path = record.run_dir / name
    if not _is_file(path):
        record.missing[name] = "is not there"
        return
    try:
        with path.open("rb") as file:
            while line := file.readline(_LINE):
                if not line.endswith(b"\n") and len(line) == _LINE:
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
    while (rest := file.readline(_LINE)) and not rest.endswith(b"\n"):
        pass


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _finite(value: object) -> float | None:
    """A number that is one; Python's JSON also reads NaN, and integers of any length."""
    if type(value) is float:  # most are
        return value if abs(value) < _LARGEST else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < _LARGEST else None


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _MAX_STEP else None  # True is an int, too


def _step(line: Mapping[str, Any]) -> int | None:
    return _whole(line.get("step"))


def _event(line: Mapping[str, Any]) -> Event | None:
    step, kind = _step(line), line.get("event")
    if step is None or not isinstance(kind, str):
        return None
    names = [name for name in line if name not in ("time", "step", "event")][:_DETAILS]
    details = {_cut(name): _detail(line[name]) for name in names}
    return Event(str(line.get("time", ""))[:40], step, kind[:40], details)


def _detail(value: object) -> str | float | None:
    """Numbers as they are, all else as text of a length that is fit for a page."""
    if value is None or isinstance(value, int | float):
        return (
            value if value is None or isinstance(value, bool) else (_whole(value) or _finite(value))
        )
    return _cut(value if isinstance(value, str) else json.dumps(value))


def _cut(text: str) -> str:
    return text if len(text) <= _TOLD else f"{text[: _TOLD - 4]} ..."


def _text(record: Record, name: str) -> str | None:
    path = record.run_dir / name
    if not _is_file(path):
        record.missing[name] = "is not there"
        return None
    try:
        with path.open("rb") as file:
            content = file.read(_FILE + 1)
        if len(content) > _FILE:
            raise ValueError
        return content.decode()
    except OSError as error:
        record.missing[name] = f"cannot be read ({error.strerror})"
    except ValueError:  # no UTF-8 either
        record.missing[name] = "is no text, or too long"
    return None


def _json_file(record: Record, name: str) -> dict[str, Any]:
    """A file that is one JSON object; empty where it is not."""
    text = _text(record, name)
    if text is None:
        return {}
    found = _parsed(text.encode())
    if found is None:
        record.missing[name] = "is no JSON object"
    return found or {}


def _plan(found: list[Summary]) -> Mapping[str, Any]:
    """Of the newest checkpoint that tells its own: whole numbers by name."""
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
        if isinstance(settings.get("student"), dict):  # older runs wrote nothing else
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
    """What the newest log file of a rank ends with, if that is an error."""
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
    last = tail[tail.rfind("\n- ") + 1 :]  # what a start or an end wrote, and all after it
    found = _ENDED.match(last)
    return found[1].strip()[:1000] if found else ""
