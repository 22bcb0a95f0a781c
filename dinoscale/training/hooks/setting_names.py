"""The names of settings in advice: those that this run reads, under a curve or in a phase."""

import re
from pathlib import Path

from dinoscale.config import RunConfig
from dinoscale.config.sections.training import REPLACED
from dinoscale.runtime.outputs import PHASES


def as_set_here(text: str, config: RunConfig) -> str:
    """Advice in which a setting that a curve replaces is the curve, and the phase is named.

    Args:
        text: names settings with their sections.
        config: of the run, or of a phase.
    """
    for curve in config.schedules.curves.keys() & REPLACED.keys():
        for name in REPLACED[curve]:
            part = ".warmup_epochs" if name.endswith("_epochs") else ""
            text = re.sub(rf"\b{re.escape(name)}\b", f"schedules.{curve}{part}", text)
    folder = Path(config.run_dir)
    if folder.parent.name != PHASES:
        return text
    phase = folder.name.partition("_")[2]
    return f"{text}. Settings are those of phase {phase}, on the command line phases.{phase}.NAME"
