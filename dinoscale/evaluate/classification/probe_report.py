"""The report of a task that trains a classifier, and its log of intermediate results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from dinoscale.errors import ConfigError, OutputError
from dinoscale.evaluate.classification.inputs import ClassifierInputs
from dinoscale.evaluate.classification.labelled_sets import describe_set
from dinoscale.runtime.fingerprint import digest_of

Result = Mapping[str, object]  # ready for JSON
Log = Callable[[Result], None]
_LONGEST_LINE = 1 << 20  # bytes; the lines of results have some hundreds


def measure_and_report(
    task: str,
    inputs: ClassifierInputs,
    measure: Callable[[nn.Module, Log], dict[str, object]],
    *,
    protocol: Mapping[str, object],
    untrained: bool,
    log_path: str | Path | None,
) -> dict[str, object]:
    """Measure the backbone and, if `untrained`, the same architecture with fresh weights.

    Args:
        task: its name.
        inputs: backbone and sets.
        measure: takes a backbone, and a function to call with each result as soon as it is known;
            returns `score` and the other parts of the report, and records in `inputs.used` which
            images it used.
        protocol: all that changes the numbers.
        untrained: also measure fresh weights.
        log_path: JSON lines, one for each result, with a digest of its settings; None keeps none.

    Returns:
        The report, ready for JSON.

    Raises:
        ConfigError: the log cannot be written.
        OutputError: the log's path holds another file.
    """
    log = _ResultLog(log_path)
    settings = digest_of([inputs.specs, protocol])  # one file may hold lines of several

    def measured(network: str, backbone: nn.Module) -> dict[str, object]:
        head = {"task": task, "weights": weights, "network": network, "settings": settings}
        return measure(backbone, lambda result: log.add({**head, **result}))

    weights = inputs.extractor.path
    found = measured("trained", inputs.backbone)
    names = ("train", "test")
    sets = zip(names, inputs.specs, (inputs.train, inputs.test), strict=True)
    report = inputs.extractor.report(
        task,
        classes=inputs.num_classes,
        **{
            name: describe_set(spec, source, **vars(inputs.used[name]))
            for name, spec, source in sets
        },
        protocol=dict(protocol),
        **found,
    )
    if untrained:
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
