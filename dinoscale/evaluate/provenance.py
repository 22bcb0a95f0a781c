"""The fingerprint of a report: files that the task read, its options, and its code."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from dinoscale.checkpoint.layout import checkpoints, run_with_checkpoints
from dinoscale.data.sources.spec_files import files_of_spec
from dinoscale.runtime.fingerprint import (
    Fingerprint,
    code_fingerprint,
    files_fingerprint,
    fingerprint,
)

WEIGHTS = "weights"  # the option
# Options of tasks that name input files.
_INPUTS = (
    *(WEIGHTS, "train", "test", "data", "images", "masks", "sequences", "ground_truth"),
    *("originals", "queries", "distractors", "pairs", "whitening", "probe", "boxes", "labels"),
    *("train_masks", "test_masks", "train_depths", "test_depths", "head"),
)
_SEVERAL = ("sets", "also")  # options that name several
# Options that change no number: where to write, how to read, and what the parser adds.
_WITHOUT_EFFECT = {
    "command",
    "fingerprint",
    "log",
    "no_cache",
    "num_workers",
    "out",
    "pictures",
    "predictions",
    "run",
    "sheet",
}
_MODULES = {
    **{
        task: (f"classification.{task}",)
        for task in ("finetune", "knn", "linear", "logistic", "transfer")
    },
    "attention": ("dense.attention", "dense.attention_files", "dense.animate"),
    "pca": ("dense.pca", "dense.animate"),
    "segment": ("dense.segment",),
    "correspond": ("correspondence.correspond",),
    "discover": ("discovery.discover",),
    "copies": ("retrieval.copies",),
    "probe": ("classification.kept_probe",),
    "rank": ("label_free.rank",),
    "retrieve": ("retrieval.landmarks", "retrieval.retrieve"),
    "video": ("video.davis",),
    "segmentation": ("segmentation.segmentation", "segmentation.kept"),
    "depth": ("depth.depth", "depth.kept"),
}


def made_from(options: Mapping[str, object]) -> Fingerprint | None:
    """Fingerprint of the report of a task; None if an input is missing, which the task reports.

    Args:
        options: of the task by name, as a command line gives them; `task` among them.

    Raises:
        UnavailableError: a file system failed for about a minute.
    """
    task, specs = str(options["task"]), input_specs(options)
    if not all(map(_is_there, specs.values())):
        return None
    settings = {name: value for name, value in options.items() if name not in _WITHOUT_EFFECT}
    return fingerprint(
        input={name: _print_of(name, spec) for name, spec in specs.items()},
        command=settings,
        code=code_fingerprint(*(f"dinoscale.evaluate.{module}" for module in _MODULES[task])),
    )


def input_specs(options: Mapping[str, object]) -> dict[str, str]:
    """What a task reads, by the option that names it; of several `OPTION.0`, `OPTION.1`, ..."""
    specs = {name: spec for name in _INPUTS if isinstance(spec := options.get(name), str)}
    for option in _SEVERAL:
        named = options.get(option)
        specs |= {
            f"{option}.{i}": x for i, x in enumerate(named if isinstance(named, list) else [])
        }
    return specs


def _is_there(spec: str) -> bool:
    return os.path.exists(os.path.expanduser(spec)) or bool(set("{*?[:") & set(spec))


def _print_of(name: str, spec: str) -> object:
    if spec.startswith("synthetic:"):
        return spec
    weights = name == WEIGHTS or name.startswith("also.")
    return files_fingerprint(*(_of_weights(spec) if weights else files_of_spec(spec)))


def _of_weights(spec: str) -> tuple[str, Iterable[str]]:
    """Folder and files of weights: the newest checkpoint of a run; a file with its card."""
    path = os.path.realpath(os.path.expanduser(spec))
    if not os.path.isdir(path):
        card = f"{path}.json"
        return os.path.dirname(path), [path, *([card] if os.path.isfile(card) else [])]
    newest = [str(checkpoint) for checkpoint in checkpoints(run_with_checkpoints(Path(path)))][-1:]
    return files_of_spec(newest[0] if newest else path)
