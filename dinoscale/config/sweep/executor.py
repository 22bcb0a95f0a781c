"""Settings of how the runs of a sweep are executed. Source of every default: [D] ours."""

from typing import Literal

from pydantic import Field

from dinoscale.config.sections.fields import Count, CountOrZero, Positive, Section


class SlurmConfig(Section):
    """What each run requests from Slurm; null leaves it to the cluster."""

    partition: str | None = Field(default=None, min_length=1, description="Partition of the jobs.")
    account: str | None = Field(default=None, min_length=1, description="Account that is charged.")
    hours: Positive = Field(default=24.0, description="Time limit of a job, in hours.")
    cpus_per_process: Count = Field(default=9, description="Cores of a rank: its loader and one.")
    setup: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="Shell lines before a run, such as 'module load cuda'.",
    )
    options: dict[str, str | int] = Field(
        default_factory=dict,
        description="More options of sbatch by name, such as constraint: h100.",
    )


class ExecutorConfig(Section):
    """Where the runs of a sweep are executed, and how many at a time."""

    kind: Literal["local", "slurm", "submitit_local"] = Field(
        default="local",
        description="local: processes of this machine. slurm: a job for each run, by submitit. "
        "submitit_local: as slurm, by submitit's stand-in on this machine, to try a sweep.",
    )
    parallel: Count = Field(default=1, description="Runs at a time; on slurm jobs in the queue.")
    nodes: Count = Field(default=1, description="Nodes of a run; more than one on slurm only.")
    processes: Count = Field(
        default=1, description="Ranks of a run on each node, usually its GPUs."
    )
    retries: CountOrZero = Field(
        default=1, description="How often a failed run is started again, from its checkpoint."
    )
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
