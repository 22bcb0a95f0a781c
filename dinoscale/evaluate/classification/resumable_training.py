"""Resumable training of a classifier: its state is saved beside the file that it writes."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.evaluate.classification.inputs import ClassifierInputs
from dinoscale.evaluate.classification.probe_report import Log, Reporting, Rest, measure_and_report
from dinoscale.runtime import distributed
from dinoscale.runtime.fingerprint import (
    Fingerprint,
    code_fingerprint,
    differences,
    fingerprint,
)
from dinoscale.runtime.outputs import atomic_write, require_ours, write_tensors

log = logging.getLogger(__name__)

State = dict[str, Any]  # tensors, numbers, strings, lists and dicts of them


class TrainingState:
    """A file with the state of a training, replaced after every measurement.

    Args:
        path: of the file; None saves nothing.
        made_from: everything that determines the training.
    """

    def __init__(self, path: Path | None, made_from: Fingerprint) -> None:
        self._path, self._made_from = path, made_from

    def load(self, device: torch.device) -> State | None:
        """The state that an earlier start saved, or None.

        Raises:
            CheckpointError: it is damaged.
            ConfigError: it belongs to another training, or cannot be read.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            kept = torch.load(self._path, map_location=device, weights_only=True)
            made_from, state = kept["made_from"], kept["state"]
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read ({error.strerror})") from error
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._path} is damaged: remove it to start the training over"
            ) from error
        changed = differences(made_from, self._made_from)
        if changed:
            raise ConfigError(
                f"{self._path} belongs to another training ({', '.join(changed)} changed since):"
                " remove it to start over, or name another --out"
            )
        log.info("%s: resuming after step %d", self._path, state["step"])
        return dict(state)

    def save(self, state: State) -> None:
        """Replace the file, whole or not at all.

        Raises:
            ConfigError: it cannot be written.
        """
        if self._path is None:
            return
        content = {"made_from": self._made_from, "state": state}
        _replace(self._path, lambda beside: torch.save(content, beside))

    def remove(self) -> None:
        """Delete the file: the training is done and reported."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class Training(Protocol):
    """The training of a classifier on one backbone, measured several times."""

    def extract(self) -> None:
        """Extract the features that it needs from the start; all ranks of a job call it."""
        ...

    def measured(self, state: State | None) -> Iterator[tuple[Any, State]]:
        """Train; yield each measurement, ready for JSON, with the state to resume after it."""
        ...

    def save(self, evaluations: Sequence[Any], out: Path) -> None:
        """Write the current weights as the last, and as the best if they are."""
        ...

    def chosen(self, evaluations: Sequence[Any]) -> dict[str, object]:
        """`score` of the report, how it was chosen, and `answers` of what was, see `Best`."""
        ...


class Best:
    """The answers of the best classifier so far, the first of equals.

    Attributes:
        answers: class of each test image, (M,) int64; empty before the first.
    """

    def __init__(self) -> None:
        self.answers = torch.zeros(0, dtype=torch.int64)
        self._top1 = -1.0

    def offer(self, top1: float, answers: Callable[[], Tensor]) -> None:
        """Take the answers of a classifier with this accuracy, if it is better."""
        if top1 > self._top1:
            self._top1, self.answers = top1, answers().cpu()

    def state(self) -> State:
        """What `of` restores."""
        return {"top1": self._top1, "answers": self.answers}

    @classmethod
    def of(cls, state: State) -> Best:
        """Restore what `state` returned."""
        best = cls()
        best._top1, best.answers = state["top1"], state["answers"].cpu()
        return best


def train_and_report(
    task: str,
    inputs: ClassifierInputs,
    begin: Callable[[nn.Module], Training],
    *,
    protocol: Mapping[str, object],
    out: Path | None,
    reporting: Reporting,
) -> dict[str, object]:
    """Train and measure, resuming an earlier start of the same training where there is one.

    All ranks of a job call it; rank 0 trains and writes.

    Args:
        task: its name, and that of its module.
        inputs: backbone and sets.
        begin: makes the training of a backbone.
        protocol: all that changes the numbers.
        out: file that the training writes; its state lies beside it until the training is
            reported. None writes nothing.
        reporting: what else to report.

    Returns:
        The report, ready for JSON.

    Raises:
        CheckpointError: the saved state of the training is damaged.
        ConfigError: a file cannot be written, or the saved state belongs to another training.
    """
    states = []

    def prepare(backbone: nn.Module) -> Rest:
        module = f"dinoscale.evaluate.classification.{task}"
        place = out if distributed.rank() == 0 else None
        saved = _state_beside(place, inputs, backbone, protocol=protocol, module=module)
        states.append(saved)
        state = distributed.together(lambda: saved.load(inputs.device))
        training = begin(backbone)
        training.extract()
        written = out if backbone is inputs.backbone else None
        return lambda log: _train(training, state, saved, written, log)

    report = measure_and_report(task, inputs, prepare, protocol=protocol, reporting=reporting)
    for saved in states:
        saved.remove()
    return report


def _train(
    training: Training, state: State | None, saved: TrainingState, out: Path | None, log: Log
) -> dict[str, Any]:
    """Train, and keep what each measurement needs; returns the parts of the report."""
    evaluations = [] if state is None else state["evaluations"]
    for evaluation, now in training.measured(state):
        log(evaluation)
        evaluations.append(evaluation)
        if out is not None:
            training.save(evaluations, out)
        saved.save({**now, "evaluations": evaluations})
    found = training.chosen(evaluations) | {"evaluations": evaluations}
    return found | ({} if out is None else {"out": str(out), "best_out": str(best_beside(out))})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda beside: write_tensors(copies, beside, metadata=dict(about)))


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    try:
        with atomic_write(path) as beside:
            write(beside)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch on a full disk
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"out: {path} cannot be written ({reason})") from error


def _state_beside(
    out: Path | None,
    inputs: ClassifierInputs,
    backbone: nn.Module,
    *,
    protocol: Mapping[str, object],
    module: str,
) -> TrainingState:
    """The state beside `out`: `out.resume`, or `out.untrained.resume` of fresh weights.

    Args:
        out: file that the training writes; None saves nothing.
        inputs: what it learns from.
        backbone: before the training.
        protocol: all settings that change a number.
        module: the one that trains.

    Raises:
        UnavailableError: the file system of a set failed for a minute.
    """
    if out is None:
        return TrainingState(None, {})
    kind = "resume" if backbone is inputs.backbone else "untrained.resume"
    made_from = fingerprint(
        input={"backbone": inputs.extractor.identity(backbone), **inputs.files},
        command=protocol,
        code=code_fingerprint(module),
    )
    return TrainingState(out.with_name(f"{out.name}.{kind}"), made_from)


def weights_files(out: Path, top1: Sequence[float]) -> list[Path]:
    """Files for the weights measured last: the last ones, and the best if they are."""
    is_best = top1.index(max(top1)) == len(top1) - 1
    return [out, best_beside(out)] if is_best else [out]


def head_beside(out: Path) -> Path:
    """File of the classifier beside that of its fine-tuned backbone: `name-head.safetensors`."""
    return out.with_name(f"{out.stem}-head{out.suffix}")


def best_beside(out: Path) -> Path:
    """File of the best weights beside that of the last: `name-best.safetensors`."""
    return out.with_name(f"{out.stem}-best{out.suffix}")


def check_target(
    out: str | Path | None, weights: str | Path, *, with_heads: bool = False
) -> Path | None:
    """Check the file to write before hours of training; None for None.

    Args:
        out: the file.
        weights: the input.
        with_heads: the classifier is written beside it.

    Raises:
        ConfigError: it is a folder, or its folder cannot be made.
        OutputError: it is the weights, or a file that this program did not write.
    """
    if out is None:
        return None
    target = Path(out)
    if target.is_dir():
        raise ConfigError(f"out: {out} is a folder; name a file")
    files = [target, best_beside(target)]
    for file in [*files, *(map(head_beside, files) if with_heads else ())]:
        require_ours(file, source=weights)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written ({error.strerror})") from error
    return target
