"""Weights of other networks that a run names by their path, maybe those of an earlier phase."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoscale.config.schema import RunConfig

# Settings that name weights, or what was stored of them.
NAMED_BY = (("gram", "teacher"), ("distill", "teacher"), ("distill", "targets"))
_CHECKPOINT = re.compile(r"checkpoints/step_([0-9]{8,20})")  # in a run's directory


@dataclass(frozen=True)
class NamedTeacher:
    """Weights that a setting names; what is said of them is by their path alone.

    Attributes:
        key: the setting.
        path: of the weights.
    """

    key: str
    path: str

    def lies_in(self, folder: str | Path) -> bool:
        """Whether they are in a folder."""
        return Path(os.path.abspath(self.path)).is_relative_to(os.path.abspath(folder))

    def step_in(self, run_dir: str | Path) -> int | None:
        """Their step if they are a checkpoint of a run."""
        if not self.lies_in(run_dir):
            return None
        path = os.path.relpath(os.path.abspath(self.path), os.path.abspath(run_dir))
        found = _CHECKPOINT.fullmatch(Path(path).as_posix())
        step = int(found[1]) if found else 0
        return step if found and step and found[1] == f"{step:08d}" else None


def named_teachers(config: RunConfig) -> tuple[NamedTeacher, ...]:
    """Those that the loss compares with, or that give its targets."""
    paths = {
        "gram.teacher": config.gram.teacher if config.gram.loss_weight else None,
        "distill.teacher": config.distill.teacher,
    }
    return tuple(NamedTeacher(key, path) for key, path in paths.items() if path is not None)


def with_run_dir(change: dict[str, Any], run_dir: str) -> dict[str, Any]:
    """The changes of a phase, `{run_dir}` in `NAMED_BY` replaced by the folder of all phases."""
    changed = dict(change)
    for name, key in NAMED_BY:
        section = changed.get(name)
        if isinstance(section, Mapping) and isinstance(section.get(key), str):
            changed[name] = {**section, key: section[key].replace("{run_dir}", run_dir)}
    return changed
