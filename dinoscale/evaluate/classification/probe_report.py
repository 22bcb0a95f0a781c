"""The report of a task that trains a classifier, and its log of intermediate results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dinoscale.errors import ConfigError, OutputError
from dinoscale.evaluate.classification.answers import Details, intervals
from dinoscale.evaluate.classification.inputs import ClassifierInputs
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import digest_of
from dinoscale.runtime.opening import on_first_rank

Result = Mapping[str, object]  # ready for JSON
Log = Callable[[Result], None]
Rest = Callable[[Log], dict[str, Any]]  # what rank 0 does with the features
_LONGEST_LINE = 1 << 20  # bytes; the lines of results have some hundreds


@dataclass(frozen=True)
class Reporting:
    """What is reported besides the score of the weights.

    Attributes:
        untrained: also that of fresh weights.
        log_path: of JSON lines, one for each result as soon as it is known, with a digest of its
            settings; None keeps none.
        details: what to say of the answers for single images.
    """

    untrained: bool
    log_path: str | Path | None
    details: Details


def measure_and_report(
    task: str,
    inputs: ClassifierInputs,
    prepare: Callable[[nn.Module], Rest],
    *,
    protocol: Mapping[str, object],
    reporting: Reporting,
) -> dict[str, object]:
    """Measure the backbone and, if asked for, the same architecture with fresh weights.

    All ranks of a job call it: they share the extraction of features, rank 0 does the rest.

    Args:
        task: its name.
        inputs: backbone and sets.
        prepare: takes a backbone; all ranks call it. Returns a function that takes one to call with
            each result as soon as it is known, and returns `score`, `answers` (the class of each
            test image, (M,) int64) and the other parts of the report. They record in `inputs.used`
            which images they used.
        protocol: all that changes the numbers.
        reporting: what else to report.

    Returns:
        The report, ready for JSON.

    Raises:
        ConfigError: the log cannot be written.
        OutputError: the log's path holds another file.
    """
    path = reporting.log_path if distributed.rank() == 0 else None
    log = distributed.together(lambda: _ResultLog(path))
    settings = digest_of([inputs.specs, protocol])  # one file may hold lines of several

    def measured(network: str, backbone: nn.Module) -> dict[str, Any]:
        head = {"task": task, "weights": weights, "network": network, "settings": settings}
        rest = prepare(backbone)
        work = on_first_rank(lambda _: rest(lambda result: log.add({**head, **result})))
        found = distributed.broadcast_object(work)
        assert found is not None
        return found

    weights = inputs.extractor.path
    found = measured("trained", inputs.backbone)
    answers = inputs.answers(found.pop("answers"))
    report = inputs.extractor.report(
        task,
        classes=inputs.num_classes,
        **inputs.describe(),
        protocol=dict(protocol),
        **found,
        intervals=intervals(found["score"], images=len(answers.labels)),
        **answers.report(reporting.details),
    )
    if reporting.untrained:
        fresh = inputs.extractor.untrained().backbone
        report["untrained"] = measured("untrained", fresh)["score"]
    return report


class _ResultLog:
    """Results so far, line by line: those of an interrupted task are not lost.

    Args:
        path: of a JSON-lines file to append to; None logs nothing.

    Raises:
        ConfigError: the file cannot be written.
        OutputError: it holds something else.
    """

    def __init__(self, path: str | Path | None):
        self._path = None if path is None else Path(path)
        if self._path is not None and self._path.is_file() and not _is_log(self._path):
            raise OutputError(
                f"log: {self._path} exists and is no log of results: choose another name"
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
