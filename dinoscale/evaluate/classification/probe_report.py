"""The report of a task that trains a classifier, and its log of results as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import nn

from dinoscale.convert.weights_file import BackboneCard
from dinoscale.errors import ConfigError, OutputError
from dinoscale.evaluate.classification.inputs import Subject
from dinoscale.evaluate.classification.labelled_sets import describe_set
from dinoscale.evaluate.untrained import untrained_backbone
from dinoscale.runtime.fingerprint import digest_of

Result = Mapping[str, object]  # ready for JSON
Log = Callable[[Result], None]
_LONGEST_LINE = 1 << 20  # bytes; those of results have some hundreds


def report_of(
    task: str,
    subject: Subject,
    measure: Callable[[nn.Module, Log], dict[str, object]],
    *,
    protocol: Mapping[str, object],
    untrained: bool,
    log_path: str | Path | None,
) -> dict[str, object]:
    """Measure the backbone and, if asked for, the same architecture with fresh weights.

    Args:
        task: its name.
        subject: what is measured.
        measure: takes a backbone, and a function to call with each result as soon as it is known;
            returns `score` and whatever else there is to report, and leaves in `subject.used` what
            was used of both sets.
        protocol: all that changes the numbers.
        untrained: measure fresh weights, too.
        log_path: JSON lines, one for each result, with a digest of what it was measured by; None
            keeps none.

    Returns:
        The report, ready for JSON.

    Raises:
        ConfigError: the log cannot be written.
        OutputError: something else lies where it is to be.
    """
    log = _ResultLog(log_path)
    settings = digest_of([subject.specs, protocol])  # one file may hold lines of several

    def of(network: str, backbone: nn.Module) -> dict[str, object]:
        head = {"task": task, "weights": subject.weights, "network": network, "settings": settings}
        return measure(backbone, lambda result: log.add({**head, **result}))

    found = of("trained", subject.backbone)
    names = ("train", "test")
    sets = zip(names, subject.specs, (subject.train, subject.test), strict=True)
    report: dict[str, object] = {
        "task": task,
        "weights": subject.weights,
        "weights_source": subject.card.source,
        "backbone": asdict(subject.card.backbone),
        "classes": subject.num_classes,
        **{
            name: describe_set(spec, source, **vars(subject.used[name]))
            for name, spec, source in sets
        },
        "protocol": dict(protocol),
        **found,
    }
    if untrained:
        fresh = untrained_backbone(subject.card).to(subject.device)
        report["untrained"] = of("untrained", fresh)["score"]
    return report


class _ResultLog:
    """What is known so far, line by line: a task that is cut off has not measured in vain.

    Args:
        path: of a JSON-lines file to append to; None keeps nothing.

    Raises:
        ConfigError: the file cannot be written.
        OutputError: it holds something else.
    """

    def __init__(self, path: str | Path | None):
        self._path = None if path is None else Path(path)
        if self._path is not None and self._path.is_file() and not _is_log(self._path):
            raise OutputError(
                f"log: {self._path} exists, and is no log of results: choose another name"
            )
        self._append("")

    def add(self, record: Result) -> None:
        """Append a line.

        Raises:
            ConfigError: the file cannot be written.
        """
        self._append(json.dumps(record) + "\n")

    def _append(self, text: str) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise ConfigError(f"log: {self._path} cannot be written ({error.strerror})") from error


def _is_log(path: Path) -> bool:
    """Whether a file is empty or begins with a result."""
    try:
        with path.open("rb") as file:
            line = file.readline(_LONGEST_LINE)
            return not line or {"task", "weights", "network"} <= set(json.loads(line))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def preprocessing(card: BackboneCard) -> dict[str, object]:
    """How test images are prepared: bicubic resize of the short side, center crop, normalise."""
    return {
        "resize": card.resize,
        "crop": card.crop,
        "interpolation": "bicubic",
        "mean": list(card.mean),
        "std": list(card.std),
    }
