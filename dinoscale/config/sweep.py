"""The file of a sweep: what to vary, by which design, what to measure, where to run."""

from pathlib import Path

from pydantic import Field

from dinoscale.config.executor import ExecutorConfig
from dinoscale.config.fields import Section


class SweepConfig(Section):
    """A sweep; `load_sweep` makes one from YAML."""

    base: str = Field(min_length=1, description="Preset or file that every run begins from.")
    out: str = Field(min_length=1, description="Folder of all that the sweep writes.")
    metrics: dict[str, str] = Field(description="What to measure, by name.")
    executor: ExecutorConfig = Field(default_factory=ExecutorConfig)


def load_sweep(path: Path) -> SweepConfig:
    """Load the file of a sweep."""
    raise NotImplementedError
