"""A training of a classifier that goes on where it was ended: its state beside what it writes."""

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
from dinoscale.evaluate.classification.inputs import Subject
from dinoscale.evaluate.classification.probe_report import Log, report_of
from dinoscale.evaluate.feature_cache import InFiles, weights_digest
from dinoscale.runtime.fingerprint import (
    Fingerprint,
    code_fingerprint,
    differences,
    files_fingerprint,
    fingerprint,
)
from dinoscale.runtime.outputs import atomic_write, require_ours, write_tensors

log = logging.getLogger(__name__)

State = dict[str, Any]  # tensors, numbers, texts, lists and dicts of them


class KeptTraining:
    """A file with the state of a training, replaced after every measurement.

    Args:
        path: of the file; None keeps nothing.
        made_from: all that decides how the training goes.
    """

    def __init__(self, path: Path | None, made_from: Fingerprint) -> None:
        self._path, self._made_from = path, made_from

    def load(self, device: torch.device) -> State | None:
        """The state of an earlier start, None without one.

        Raises:
            CheckpointError: it is damaged.
            ConfigError: it is of another training, or cannot be read.
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
                f"{self._path} is damaged: remove it, and the training begins anew"
            ) from error
        changed = differences(made_from, self._made_from)
        if changed:
            raise ConfigError(
                f"{self._path} is of another training ({', '.join(changed)} changed since): remove"
                " it to begin anew, or name another --out"
            )
        log.info("%s: going on after step %d", self._path, state["step"])
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
        """The training is done and reported."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class Training(Protocol):
    """A training of a classifier on one backbone, which is measured on its way."""

    def measured(self, state: State | None) -> Iterator[tuple[Any, State]]:
        """Train; yield each measurement, ready for JSON, with the state to go on after it."""
        ...

    def save(self, evaluations: Sequence[Any], out: Path) -> None:
        """Write what is trained by now as the last one, and where it is as the best."""
        ...

    def chosen(self, evaluations: Sequence[Any]) -> dict[str, object]:
        """`score` of the report and how it was chosen."""
        ...


def report_of_training(
    task: str,
    subject: Subject,
    begin: Callable[[nn.Module], Training],
    *,
    protocol: Mapping[str, object],
    out: Path | None,
    untrained: bool,
    log_path: str | Path | None,
) -> dict[str, object]:
    """Train and measure, from where an earlier start of the same training was ended.

    Args:
        task: its name, and that of its module.
        subject: what is measured.
        begin: the training of a backbone.
        protocol: all that changes the numbers.
        out: what the training writes, and beside it the state until it is reported; None keeps
            nothing.
        untrained: train on fresh weights, too.
        log_path: as of `report_of`.

    Returns:
        The report, ready for JSON.

    Raises:
        CheckpointError: what is kept of the training is damaged.
        ConfigError: a file cannot be written, or another training is kept beside `out`.
    """
    trainings = []

    def measure(backbone: nn.Module, log: Log) -> dict[str, object]:
        module = f"dinoscale.evaluate.classification.{task}"
        kept = _keep(out, subject, backbone, protocol=protocol, module=module)
        trainings.append(kept)
        state = kept.load(subject.device)
        evaluations = [] if state is None else state["evaluations"]
        written = out if backbone is subject.backbone else None
        training = begin(backbone)
        for evaluation, now in training.measured(state):
            log(evaluation)
            evaluations.append(evaluation)
            if written is not None:
                training.save(evaluations, written)
            kept.save({**now, "evaluations": evaluations})
        found = training.chosen(evaluations) | {"evaluations": evaluations}
        if written is None:
            return found
        return found | {"out": str(written), "best_out": str(best_beside(written))}

    report = report_of(
        task, subject, measure, protocol=protocol, untrained=untrained, log_path=log_path
    )
    for kept in trainings:
        kept.remove()
    return report


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


def _keep(
    out: Path | None,
    subject: Subject,
    backbone: nn.Module,
    *,
    protocol: Mapping[str, object],
    module: str,
) -> KeptTraining:
    """Keep a training beside `out`, as `out.resume`, or `out.untrained.resume` of fresh weights.

    Args:
        out: what the training writes; None keeps nothing.
        subject: what it learns from.
        backbone: as it is before.
        protocol: all settings that change a number.
        module: that trains.

    Raises:
        UnavailableError: the file system of a set failed for a minute.
    """
    if out is None:
        return KeptTraining(None, {})
    kind = "resume" if backbone is subject.backbone else "untrained.resume"
    sets = zip(("train", "test"), subject.specs, (subject.train, subject.test), strict=True)
    files = {
        name: files_fingerprint("", source.files()) if isinstance(source, InFiles) else spec
        for name, spec, source in sets
    }
    made_from = fingerprint(
        input={"weights": weights_digest(backbone), **files},
        command=protocol,
        code=code_fingerprint(module),
    )
    return KeptTraining(out.with_name(f"{out.name}.{kind}"), made_from)


def targets_of(out: Path, top1: Sequence[float]) -> list[Path]:
    """Where what was measured last is written: as the last one, and as the best if it is."""
    is_best = top1.index(max(top1)) == len(top1) - 1
    return [out, best_beside(out)] if is_best else [out]


def best_beside(out: Path) -> Path:
    """Where the best is written, `out` being the last: `name-best.safetensors`."""
    return out.with_name(f"{out.stem}-best{out.suffix}")


def writable(out: str | Path | None, weights: str | Path) -> Path | None:
    """The file to write, before hours are spent on it; None for None.

    Raises:
        ConfigError: it is a folder, or its folder cannot be made.
        OutputError: it is the weights, or something lies there that is not ours.
    """
    if out is None:
        return None
    target = Path(out)
    if target.is_dir():
        raise ConfigError(f"out: {out} is a folder; name a file")
    require_ours(target, source=weights)
    require_ours(best_beside(target), source=weights)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written ({error.strerror})") from error
    return target
